"""Putting several samples into one sequence, so that long sequences are full; attention is kept apart elsewhere."""

import numpy as np
import numpy.typing as npt

WINDOW_SAMPLES = 1 << 14
"""Samples packed with one another; a shuffled window this large packs as well as all at once and keeps the order of
an epoch random."""


def pack_sequences(lengths: npt.NDArray[np.int64], max_length: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Pack samples by best fit decreasing: the longest first, each where the least room is left over.

    The samples of a sequence are in ascending order, and sequences come window by window.

    Args:
        lengths: Tokens of each sample, int64, shape [num_samples].
        max_length: Most tokens of a sequence.
        seed: Decides which samples share a window.

    Returns:
        The sample indices of each sequence; every sample is in exactly one.

    Raises:
        ValueError: A sample is longer than a sequence.
    """
    if len(lengths) and int(lengths.max()) > max_length:
        raise ValueError(f"a sample of {int(lengths.max())} tokens does not fit into a sequence of {max_length}")
    order = np.random.default_rng(seed).permutation(len(lengths))
    packs: list[npt.NDArray[np.int64]] = []
    for start in range(0, len(order), WINDOW_SAMPLES):
        window = order[start : start + WINDOW_SAMPLES]
        packs += _pack_window(window, lengths[window], max_length)
    return packs


def _pack_window(
    indices: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], max_length: int
) -> list[npt.NDArray[np.int64]]:
    packs: list[list[int]] = []
    # Open packs by the room they have left, and a bit for each room there is: the lowest bit at or above a length is
    # the best fit, found without looking at the packs.
    packs_with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0
    for position in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[position])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = packs_with_room[room].pop()
            if not packs_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(int(indices[position]))
        left = room - length
        packs_with_room[left].append(pack)
        rooms |= 1 << left
    return [np.sort(np.array(pack, dtype=np.int64)) for pack in packs]
