"""Which model an estimate is for, and what of its config.json decides memory; DeepSeek-Coder's sizes are built in."""

from dataclasses import dataclass
from pathlib import Path

from dsft.core.config.schema import TrainConfig
from dsft.core.memory.engine_families import find_model_obstacle
from dsft.core.memory.model_shape import BUILTIN_CONFIGS, ModelShape, read_model_shape
from dsft.core.models.load import check_trainable
from dsft.core.models.source import ModelSource, find_model


@dataclass(frozen=True)
class EstimatedModel:
    """A model whose memory can be calculated.

    Attributes:
        source: Where it is and its config.json.
        shape: Its sizes.
    """

    source: ModelSource
    shape: ModelShape

    def check_length(self, max_length: int) -> None:
        """Refuse lengths that the model can't be trained with.

        Raises:
            ModelError: It has fewer positions, or a shorter attention window.
        """
        check_trainable(self.source, max_length)

    def find_engine_obstacle(self, config: TrainConfig) -> str | None:
        """Return why dsft's engine can't compute the model on a GPU, to go on after "because"; None if it can."""
        return find_model_obstacle(self.source.model_config, lora_dropout=config.lora_dropout, is_gpu=True)


def find_shape(config: TrainConfig) -> EstimatedModel:
    """Find the model of a configuration and read its shape; the weights need not be there.

    Raises:
        ModelError: There is no such model, or dsft can't train it.
        UnreachableHubError: It is on the hub, which does not answer, and its config.json is not in the cache.
    """
    name = config.model_name
    builtin = BUILTIN_CONFIGS.get(name)
    if builtin is not None and not Path(name).exists():
        source = ModelSource(name, name, config.model_revision, None, builtin)
    else:
        source = find_model(name, config.model_revision)
    check_trainable(source, max_length=1)
    return EstimatedModel(source, read_model_shape(source.model_config, name))
