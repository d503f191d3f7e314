"""The script that makes the embedded demo model: its tokenizer, its split, its loss, and a run of three steps."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[3] / "scripts"
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def scripts():
    """Make the scripts' modules importable for this file alone."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import pretrain_tiny
        import tiny_corpus
        import tiny_model

        yield {"pretrain": pretrain_tiny, "corpus": tiny_corpus, "model": tiny_model}
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def tokenizer(scripts):
    return scripts["model"].train_tokenizer([path.read_text("utf-8") for path in sorted(STDLIB.glob("[a-d]*.py"))])


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n\treturn  x\n\n\n    y = 1\r\n",
        " leading and trailing  ",
        "\t\t\n \n  \n",
        "größer 日本語 🎉 \u00a0\u3000x",
        "x = 0x1F + 12345 != ``y``  # $^~",
        "",
    ],
)
def test_tokenizer_keeps_every_character(scripts, tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids[0] == scripts["model"].BOS_ID
    assert tokenizer.decode(ids) == text


def test_special_tokens_stand_on_the_last_ids_in_deepseek_coders_order(tokenizer):
    assert tokenizer.get_vocab_size() == 2048
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>"]
    names += ["<pad>", "<|User|>", "<|Assistant|>", "<|EOT|>"]
    assert [tokenizer.id_to_token(token_id) for token_id in range(2039, 2048)] == names
    assert tokenizer.encode("<｜fim▁begin｜>a<｜fim▁hole｜>\n", add_special_tokens=False).ids[::2] == [2042, 2041]


def test_tokenizer_is_built_like_deepseek_coders(shared, tokenizer):
    theirs = json.loads((shared / "assets/deepseek-coder-6.7b/tokenizer.json").read_text("utf-8"))
    ours = json.loads(tokenizer.to_str())
    assert ours["normalizer"] == theirs["normalizer"]
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    assert ours["decoder"] == theirs["decoder"]
    assert ours["post_processor"]["single"] == theirs["post_processor"]["single"]
    assert ours["post_processor"]["pair"] == theirs["post_processor"]["pair"]
    their_tokens = [{**token, "id": token["id"] - 32013 + 2039} for token in theirs["added_tokens"][13:]]
    assert ours["added_tokens"] == their_tokens
    assert {**ours["model"], "vocab": 0, "merges": 0} == {**theirs["model"], "vocab": 0, "merges": 0}


def test_too_little_text_is_refused(scripts, capsys):
    with pytest.raises(SystemExit) as stopped:
        scripts["model"].train_tokenizer(["print('hello')\n"])
    assert stopped.value.code == 2
    assert "more text is needed" in capsys.readouterr().err


def test_sources_are_split_by_path_and_unusable_files_left_out(scripts, tmp_path):
    names = [f"m{number}.py" for number in range(100)]
    for name in names:
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "_sysconfigdata_x.py").write_text("build = {}")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("installed")
    train, held_out = scripts["corpus"].read_sources(tmp_path)
    assert sorted(train + held_out) == sorted(names)
    assert held_out == sorted(name for name in names if scripts["corpus"].is_validation_file(name))
    assert 3 <= len(held_out) <= 20


def test_windows_predict_each_token_once(scripts):
    windows = scripts["corpus"].cut_windows(torch.arange(101, dtype=torch.int16), window=10, max_tokens=1000)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 101))
    assert len(scripts["corpus"].cut_windows(torch.arange(101), window=10, max_tokens=30)) == 3


def test_loss_is_the_models_own(scripts):
    torch.manual_seed(0)
    model = scripts["model"].build_model("cpu").eval()
    ids = torch.randint(0, 2048, (2, 33))
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
        torch.testing.assert_close(scripts["pretrain"].make_loss(model, 32, "cpu")(ids), expected)
    assert scripts["pretrain"].measure_loss(model, ids, "cpu") == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.long
def test_three_steps_write_a_model_that_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sources = tmp_path / "sources"
    sources.mkdir()
    for path in STDLIB.glob("[a-d]*.py"):
        shutil.copy(path, sources)
    out = tmp_path / "new" / "model"
    command = [sys.executable, str(SCRIPTS / "pretrain_tiny.py"), "--sources", str(sources), "--out", str(out)]
    command += ["--device", "cpu", "--steps", "3", "--window", "64", "--batch-tokens", "256"]
    command += ["--validation-tokens", "1024", "--dropout", "0.1"]
    for _ in range(2):  # the second run replaces the first one's folder
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert [path.name for path in out.parent.iterdir()] == ["model"]
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors", "pretraining.json"}
    assert {path.name for path in out.iterdir()} == files | {"tokenizer.json", "tokenizer_config.json"}
    facts = json.loads((out / "pretraining.json").read_text("utf-8"))
    assert (facts["steps"], facts["tokens_seen"], len(facts["curve"])) == (3, 768, 3)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("import os\n", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, min_new_tokens=2).shape[1] == ids["input_ids"].shape[1] + 2
