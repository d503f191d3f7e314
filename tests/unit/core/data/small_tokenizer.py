"""Tokenizers made on the spot: one of DeepSeek-Coder's kind, and one of the kind that puts a blank before each text."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, EOT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|EOT|>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
CHAT_ML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_deepseek_like(chat_template: str | None = None, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE; as in DeepSeek-Coder only BOS and EOS are marked special, and PAD is EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator(["### Instruction: Response: def return the value of print"] * 20, trainer)
    backend.add_tokens([AddedToken("õ", normalized=True)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS)])
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token in (FIM_HOLE, FIM_BEGIN, FIM_END, "<pad>", EOT, "<|im_start|>", "<|im_end|>")
        ]
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    return _wrap(backend, chat_template)


def make_prefixing() -> PreTrainedTokenizerFast:
    """One token a character, a blank written as ▁, and one more of it before each text, as in Llama 2."""
    characters = [*map(chr, range(33, 127)), "\n", "▁"]
    tokens = ["<unk>", BOS, EOS, *characters]
    backend = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[], unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", BOS, EOS])
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return _wrap(backend, None)


def _wrap(backend: Tokenizer, chat_template: str | None) -> PreTrainedTokenizerFast:
    settings: dict[str, Any] = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    tokenizer.chat_template = chat_template
    return tokenizer
