"""What each tensor of the merged model is made of, decided from names and shapes; reads no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dsft.core.errors import ModelError
from dsft.core.models.weight_files import WeightFiles
from dsft.merge.adapter import Adapter
from dsft.merge.adapter_names import AdapterNames
from dsft.merge.structure import LowRankSite, Structure
from dsft.merge.weights import MergedTensor


@dataclass(frozen=True)
class LowRankUpdate:
    """A low-rank update by the names of its tensors in the adapter.

    Attributes:
        site: Where and how it is added.
        a: Factor A, rank x inputs.
        b: Factor B, outputs x rank.
        magnitudes: Norm of each output's weights (DoRA); None without.
    """

    site: LowRankSite
    a: str
    b: str
    magnitudes: str | None


@dataclass(frozen=True)
class BiasUpdate:
    """What a low-rank update adds to a bias: an adapter's tensor, multiplied."""

    name: str
    scaling: float


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that an adapter's tensor replaces."""

    name: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the merged model is made.

    Attributes:
        tensor: The tensor.
        origin: Whose tensor it starts from.
        source: Name of that tensor there.
        update: Low-rank update of a weight.
        bias_update: Update of a bias.
        token_rows: Rows that are replaced.
        is_quantized: Whether training computed with its NF4 round trip.
    """

    tensor: MergedTensor
    origin: Literal["base", "adapter"]
    source: str
    update: LowRankUpdate | None = None
    bias_update: BiasUpdate | None = None
    token_rows: TokenRows | None = None
    is_quantized: bool = False

    @property
    def is_changed(self) -> bool:
        """Whether the adapter has a part in it."""
        return self.origin == "adapter" or any((self.update, self.bias_update, self.token_rows))


@dataclass(frozen=True)
class MergePlan:
    """All tensors of the merged model.

    Attributes:
        recipes: In the order they are written.
        is_tied: Whether the head is the embedding; it is not among the recipes then.
        vocab_size: Rows of the embedding.
    """

    recipes: tuple[Recipe, ...]
    is_tied: bool
    vocab_size: int


def plan_merge(
    structure: Structure, adapter: Adapter, names: AdapterNames, base: WeightFiles, base_name: str
) -> MergePlan:
    """Decide how every tensor is made, and refuse what does not fit.

    Args:
        structure: The base model and where the adapter changes it.
        adapter: The adapter.
        names: What its tensors are for; all have their place in the base model.
        base: The base model's tensors.
        base_name: What messages call the base.

    Raises:
        ModelError: The base's tensors are missing, or quantized, or some are of another shape than is needed.
    """
    recipes = {name: _make_recipe(name, structure, adapter, base, base_name, names) for name in structure.shapes}
    is_tied = structure.is_tied and not _unties(structure, recipes)
    if is_tied and structure.head is not None:
        del recipes[structure.head]
    for recipe in recipes.values():
        if recipe.origin == "base":
            _check_is_float(recipe.source, base, base_name)
        _check_shapes(recipe, adapter, base, base_name)
    return MergePlan(tuple(recipes.values()), is_tied, structure.shapes[structure.embedding][0])


def find_stored_name(name: str, stored: Mapping[str, object], prefix: str) -> str | None:
    """Return under which name a checkpoint stores a model's tensor; None where it does not.

    A checkpoint of a model that was saved without its head lacks the prefix of the names in front of all others.
    """
    candidates = (name, name.removeprefix(prefix), f"{prefix}{name}")
    return next((candidate for candidate in candidates if candidate in stored), None)


def _make_recipe(
    name: str,
    structure: Structure,
    adapter: Adapter,
    base: WeightFiles,
    base_name: str,
    names: AdapterNames,
) -> Recipe:
    path, _, kind = name.rpartition(".")
    tensor = MergedTensor(name, structure.shapes[name])
    origin: Literal["base", "adapter"] = "base"
    source = names.replaced.get(name)
    if source is not None:
        origin = "adapter"
    else:
        source = _find_in_base(name, structure, base, names)
        if source is None:
            raise ModelError(
                f"{base_name} has no tensor {name}, which its config.json asks for.",
                "Copy the model again; if its checkpoint has other names, load it with transformers and save it anew.",
            )
        if source in names.replaced.values():
            origin = "adapter"
    site = structure.sites.get(path)
    factors = names.factors.get(path)
    rows = names.token_rows.get(path) or (
        names.token_rows.get(structure.embedding.rpartition(".")[0]) if _is_tied_head(structure, path) else None
    )
    is_weight = kind == "weight"
    return Recipe(
        tensor,
        origin,
        source,
        update=LowRankUpdate(site, factors.a, factors.b, factors.magnitudes)
        if site and factors and is_weight
        else None,
        bias_update=BiasUpdate(factors.bias, site.scaling)
        if site and factors and site.has_bias and kind == "bias"
        else None,
        token_rows=TokenRows(rows, structure.token_indices[path])
        if rows is not None and is_weight and path in structure.token_indices
        else None,
        is_quantized=name in structure.linear_weights and origin == "base",
    )


def _find_in_base(name: str, structure: Structure, base: WeightFiles, names: AdapterNames) -> str | None:
    if name == structure.head and structure.is_tied:
        # What a tied head holds in a checkpoint is not read by transformers either.
        if structure.embedding in names.replaced and _is_plain(structure, structure.embedding):
            return names.replaced[structure.embedding]
        return find_stored_name(structure.embedding, base.tensors, structure.prefix)
    return find_stored_name(name, base.tensors, structure.prefix)


def _is_plain(structure: Structure, weight: str) -> bool:
    """Return whether an adapter's own embedding stands in the place of the base's, and not beside it."""
    return weight.rpartition(".")[0] not in structure.saved_modules


def _is_tied_head(structure: Structure, path: str) -> bool:
    return structure.is_tied and structure.head is not None and path == structure.head.rpartition(".")[0]


def _unties(structure: Structure, recipes: dict[str, Recipe]) -> bool:
    """Return whether the adapter makes a head of its own of one that is tied to the embedding."""
    if structure.head is None or structure.adapted.peft_config["default"].ensure_weight_tying:
        return False
    embedding, head = recipes[structure.embedding], recipes[structure.head]
    if embedding.update is not None or head.update is not None:
        return True
    # PEFT trains the rows of both as one where they are the same rows, under whatever names it saves them.
    if _row_indices(embedding) != _row_indices(head):
        return True
    # Both of a resized model are saved, but were one.
    are_plain = _is_plain(structure, structure.embedding) and _is_plain(structure, structure.head)
    if are_plain and embedding.origin == head.origin:
        return False
    return (embedding.origin, embedding.source) != (head.origin, head.source)


def _row_indices(recipe: Recipe) -> tuple[int, ...] | None:
    return None if recipe.token_rows is None else recipe.token_rows.indices


def _check_is_float(name: str, base: WeightFiles, base_name: str) -> None:
    """Refuse weights that are quantized without a word of it in config.json."""
    dtype = base.dtype(name)
    if not dtype.is_floating_point:
        raise ModelError(
            f"{name} of {base_name} holds numbers of the type {str(dtype).removeprefix('torch.')}, so it is quantized.",
            "Give the model with its 16-bit weights.",
        )


def _check_shapes(recipe: Recipe, adapter: Adapter, base: WeightFiles, base_name: str) -> None:
    name, shape = recipe.tensor.name, recipe.tensor.shape
    found = adapter.weights.shape(recipe.source) if recipe.origin == "adapter" else base.shape(recipe.source)
    if found != shape:
        owner = f"the adapter {adapter.folder}" if recipe.origin == "adapter" else base_name
        raise ModelError(
            f"{recipe.source} of {owner} has the shape {list(found)}, and {list(shape)} is needed.",
            "Give the model the adapter was trained on with --base.",
        )
    expected: dict[str, tuple[int, ...]] = {}
    if recipe.update is not None:
        site = recipe.update.site
        num_outputs, num_inputs = reversed(shape) if site.is_transposed else shape
        expected[recipe.update.a] = (site.rank, num_inputs)
        expected[recipe.update.b] = (num_outputs, site.rank)
        if recipe.update.magnitudes is not None:
            expected[recipe.update.magnitudes] = (num_outputs,)
    if recipe.bias_update is not None:
        expected[recipe.bias_update.name] = shape
    if recipe.token_rows is not None:
        expected[recipe.token_rows.name] = (len(recipe.token_rows.indices), *shape[1:])
    for part, part_shape in expected.items():
        if adapter.weights.shape(part) != part_shape:
            raise ModelError(
                f"{part} of the adapter {adapter.folder} has the shape {list(adapter.weights.shape(part))}, and "
                f"{name} of {base_name} needs {list(part_shape)}.",
                "Give the model it was trained on with --base.",
            )
