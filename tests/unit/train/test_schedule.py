import pytest

from dsft.train.schedule import learning_rate_factor


def factors(num_warmup_steps: int, num_steps: int, shape) -> list[float]:
    return [
        learning_rate_factor(step, num_warmup_steps=num_warmup_steps, num_steps=num_steps, shape=shape)
        for step in range(num_steps)
    ]


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("num_warmup_steps", "num_steps"), [(0, 1), (1, 1), (1, 2), (3, 100), (5, 5)])
def test_no_step_is_taken_with_a_rate_of_0_or_above_the_peak(shape, num_warmup_steps: int, num_steps: int):
    assert all(0 < factor <= 1 for factor in factors(num_warmup_steps, num_steps, shape))


def test_the_rate_rises_evenly_to_its_peak_and_falls_from_there():
    assert factors(3, 7, "linear") == pytest.approx([0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25])
    assert factors(3, 7, "constant") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1])
    cosine = factors(3, 7, "cosine")
    assert cosine[3:] == pytest.approx([1, 0.853553, 0.5, 0.146447], rel=1e-5)


def test_beyond_its_end_a_run_has_a_rate_of_0():
    assert learning_rate_factor(9, num_warmup_steps=1, num_steps=5, shape="cosine") == 0
