"""What the tensors of an adapter are for, told from their names; none may be missing or without a place."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dsft.core.errors import ModelError
from dsft.merge.adapter import Adapter
from dsft.merge.structure import LowRankSite, Structure

_PREFIX = "base_model.model."
_WRAPPERS = ("base_layer", "original_module", "modules_to_save", "token_adapter")
"""Modules that PEFT puts around a module of the base; older versions leave them in the names they save."""

_FACTORS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_embedding_A": "lora_A",
    ".lora_embedding_B": "lora_B",
    ".lora_B.bias": "lora_B's bias",
    ".lora_magnitude_vector": "lora_magnitude_vector",
    ".lora_magnitude_vector.weight": "lora_magnitude_vector",
}
_REPLACED_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass
class Factors:
    """Names of the tensors of one low-rank update by what they are: "lora_A", "lora_B" and so on."""

    names: dict[str, str] = field(default_factory=dict)

    @property
    def a(self) -> str:
        """Factor A, rank x inputs."""
        return self.names["lora_A"]

    @property
    def b(self) -> str:
        """Factor B, outputs x rank."""
        return self.names["lora_B"]

    @property
    def bias(self) -> str:
        """What is added to the bias, outputs."""
        return self.names["lora_B's bias"]

    @property
    def magnitudes(self) -> str | None:
        """Norm of each output's weights (DoRA); None without."""
        return self.names.get("lora_magnitude_vector")


@dataclass
class AdapterNames:
    """The adapter's tensors by what they are for.

    Attributes:
        factors: Low-rank updates by module path.
        replaced: Tensors that take the place of the base's, by its names.
        token_rows: Rows that take the place of an embedding's, by module path.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    token_rows: dict[str, str] = field(default_factory=dict)


def sort_names(adapter: Adapter) -> AdapterNames:
    """Find out what each tensor of an adapter is for.

    Raises:
        ModelError: A name that PEFT doesn't give.
    """
    names = AdapterNames()
    # A module that is trained whole stands beside its original, which some versions of PEFT save too and nothing uses.
    for full in sorted(adapter.weights.names, key=lambda name: (".original_module." not in name, name)):
        if not full.startswith(_PREFIX):
            raise ModelError(
                f"The adapter {adapter.folder} holds {full}, which is no name that PEFT gives.", "Save it with PEFT."
            )
        name = full.removeprefix(_PREFIX)
        suffix = next((suffix for suffix in _FACTORS if name.endswith(suffix)), None)
        if suffix is not None:
            names.factors.setdefault(name.removesuffix(suffix), Factors()).names[_FACTORS[suffix]] = full
        elif name.endswith(_REPLACED_ROWS):
            names.token_rows[name.removesuffix(_REPLACED_ROWS)] = full
        else:
            names.replaced[strip_wrappers(name)] = full
    return names


def strip_wrappers(name: str) -> str:
    """Return the base model's name of a tensor that PEFT has wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def check_names(names: AdapterNames, structure: Structure, adapter: Adapter, base_name: str) -> None:
    """Refuse an adapter that holds too much or too little for a base model.

    Args:
        names: What its tensors are for.
        structure: The base model and where the adapter's settings change it.
        adapter: The adapter.
        base_name: What messages call the base.

    Raises:
        ModelError: A tensor has no place in the model, or one that was trained is missing.
    """
    surplus = next(_find_surplus(names, structure), None)
    if surplus is not None:
        raise ModelError(
            f"The adapter {adapter.folder} belongs to another model: {base_name} has no place for {surplus}.",
            "Give the model it was trained on with --base.",
        )
    missing = next(_find_missing(names, structure, adapter.config.bias), None)
    if missing is not None:
        raise ModelError(
            f"The adapter {adapter.folder} is incomplete for {base_name}: {missing} was trained and is missing.",
            "Copy the adapter again, or give the model it was trained on with --base.",
        )
    for path, site in structure.sites.items():
        if site.has_bias and f"{path}.bias" not in structure.shapes:
            raise ModelError(
                f"The adapter {adapter.folder} adds a bias to {path}, which has none in {base_name}.",
                "Use it unmerged.",
            )


def _find_surplus(names: AdapterNames, structure: Structure) -> Iterator[str]:
    for path, factors in names.factors.items():
        site = structure.sites.get(path)
        needed = () if site is None else _needed_factors(site)
        yield from (full for factor, full in factors.names.items() if factor not in needed)
    yield from (full for name, full in names.replaced.items() if name not in structure.shapes)
    yield from (full for path, full in names.token_rows.items() if path not in structure.token_indices)


def _find_missing(names: AdapterNames, structure: Structure, bias: str) -> Iterator[str]:
    for path, site in structure.sites.items():
        found = names.factors.get(path, Factors()).names
        yield from (f"{factor} of {path}" for factor in _needed_factors(site) if factor not in found)
    head = None if structure.head is None or not structure.is_tied else structure.head.rpartition(".")[0]
    # What a tied head shares with the embedding is saved once.
    for path in structure.saved_modules - {head}:
        yield from (name for name in structure.shapes if name.startswith(f"{path}.") and name not in names.replaced)
    for path in structure.token_indices.keys() - {head}:
        if path not in names.token_rows:
            yield f"the rows of {path}"
    if bias != "none":
        sites = structure.sites if bias == "lora_only" else None
        for name in structure.shapes:
            path, _, kind = name.rpartition(".")
            if kind == "bias" and (sites is None or path in sites) and name not in names.replaced:
                yield name


def _needed_factors(site: LowRankSite) -> tuple[str, ...]:
    needed = ["lora_A", "lora_B"]
    if site.has_magnitudes:
        needed.append("lora_magnitude_vector")
    if site.has_bias:
        needed.append("lora_B's bias")
    return tuple(needed)
