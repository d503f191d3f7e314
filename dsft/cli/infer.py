"""`dsft infer`: its options, and which way of asking they choose."""

from pathlib import Path
from typing import Annotated

import typer

from dsft.cli.errors import Terminated, report
from dsft.cli.infer_modes import ModeOptions, read_prompt, read_text_value
from dsft.cli.options import RUN_PANEL, JsonOption, QuietOption
from dsft.cli.output import Output
from dsft.core.config.schema import TemplateChoice
from dsft.core.models.device import DeviceChoice
from dsft.infer.config import DEFAULT_MAX_NEW_TOKENS, InferConfig
from dsft.infer.dtype import DtypeChoice

_MODEL_PANEL = "Model and prompt"
_MODE_PANEL = "Other ways to ask"
_SAMPLING_PANEL = "Answer"


def infer(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.", show_default=False)
    ] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Adapter folder, model folder, hub id or builtin:tiny/model; without it the newest ./trained_* run.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Base model of the adapter, instead of the recorded one.", rich_help_panel=_MODEL_PANEL
        ),
    ] = None,
    template: Annotated[
        TemplateChoice,
        typer.Option(
            help="Prompt template; auto is the one the adapter was trained with, else chat where the tokenizer has a "
            "chat template, else instruction.",
            rich_help_panel=_MODEL_PANEL,
        ),
    ] = "auto",
    is_raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, no template.", rich_help_panel=_MODEL_PANEL)
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System text, for templates that have one.", rich_help_panel=_MODEL_PANEL),
    ] = None,
    is_chat: Annotated[
        bool,
        typer.Option("--chat", help="Talk with the model, with a history; /help there.", rich_help_panel=_MODE_PANEL),
    ] = False,
    is_comparing: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Answer with the base model alone and with the adapter, side by side.",
            rich_help_panel=_MODE_PANEL,
        ),
    ] = False,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Answer each prompt of a JSONL file.", rich_help_panel=_MODE_PANEL),
    ] = None,
    answers_file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="With --file: new JSONL file of the answers; a batch that broke off is gone on with.",
            rich_help_panel=_MODE_PANEL,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --file: most prompts at once; without it as many as fit.",
            rich_help_panel=_MODE_PANEL,
        ),
    ] = None,
    fim_file: Annotated[
        Path | None,
        typer.Option(
            "--fim",
            metavar="FILE",
            help="Write what belongs at the mark <FILL> of a source file.",
            rich_help_panel=_MODE_PANEL,
        ),
    ] = None,
    is_in_place: Annotated[
        bool,
        typer.Option("--in-place", help="With --fim: write it into the file.", rich_help_panel=_MODE_PANEL),
    ] = False,
    fim_prefix: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Write what belongs behind this text; @FILE reads it from a file, @@ stands for an @ at its start.",
            rich_help_panel=_MODE_PANEL,
        ),
    ] = None,
    fim_suffix: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Write what belongs before this text, between it and --fim-prefix; @FILE and @@ as there.",
            rich_help_panel=_MODE_PANEL,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens of the answer.", rich_help_panel=_SAMPLING_PANEL)
    ] = DEFAULT_MAX_NEW_TOKENS,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Sample at this temperature; --top-p and --top-k alone sample at 1. At 0, and without all three, the "
            "likeliest token is taken each time.",
            rich_help_panel=_SAMPLING_PANEL,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Sample from the likeliest tokens that together have this probability.",
            rich_help_panel=_SAMPLING_PANEL,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="N", help="Sample from the N likeliest tokens.", rich_help_panel=_SAMPLING_PANEL),
    ] = None,
    repetition_penalty: Annotated[
        float,
        typer.Option(
            metavar="X", help="Above 1, tokens seen before become less likely.", rich_help_panel=_SAMPLING_PANEL
        ),
    ] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Seed of the sampling; without it one is drawn and told.", rich_help_panel=_SAMPLING_PANEL
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End the answer before this text; may be given several times.",
            rich_help_panel=_SAMPLING_PANEL,
        ),
    ] = None,
    is_code: Annotated[
        bool,
        typer.Option(
            "--code",
            help="Print only the first code block of the answer; an answer without one as it is.",
            rich_help_panel=_SAMPLING_PANEL,
        ),
    ] = False,
    dtype: Annotated[
        DtypeChoice,
        typer.Option(
            help="Number type; auto is bfloat16 where the GPU has it, else float16, and float32 on a CPU.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = "auto",
    use_4bit: Annotated[
        bool,
        typer.Option("--load-in-4bit", help="Quantize the weights to NF4 while loading.", rich_help_panel=RUN_PANEL),
    ] = False,
    is_speculating: Annotated[
        bool,
        typer.Option(
            "--speculate",
            help="Try what followed the same words before, several tokens at once; but for rounding ties in 16 bits, "
            "the answer stays the same.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = False,
    device: Annotated[
        DeviceChoice,
        typer.Option(help="Where to compute; auto takes the GPU if there is one.", rich_help_panel=RUN_PANEL),
    ] = "auto",
    use_json: JsonOption = False,
    is_quiet: QuietOption = False,
) -> None:
    """Generate text with a model or a trained adapter."""
    modes = ModeOptions(
        prompt=prompt,
        is_chat=is_chat,
        is_comparing=is_comparing,
        prompts_file=prompts_file,
        answers_file=answers_file,
        batch_size=batch_size,
        fim_file=fim_file,
        is_in_place=is_in_place,
        fim_prefix=fim_prefix,
        fim_suffix=fim_suffix,
        template=template,
        is_raw=is_raw,
        system=system,
        is_code=is_code,
        is_speculating=is_speculating,
        use_json=use_json,
    )
    config = InferConfig(
        model=model,
        base=base,
        template=template,
        is_raw=is_raw,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        dtype=dtype,
        use_4bit=use_4bit,
        is_speculating=is_speculating,
        device=device,
    )
    output = Output(use_json=use_json, is_quiet=is_quiet)
    try:
        _dispatch(modes, config, output)
    except (KeyboardInterrupt, Terminated) as ended:
        told = report(ended)
        output.emit({"error": told})  # people have seen how far it came
        if told.fix:
            output.note(told.fix)
        raise typer.Exit(told.exit_code) from None


def _dispatch(modes: ModeOptions, config: InferConfig, output: Output) -> None:
    if modes.is_chat:
        from dsft.cli.infer_chat import run_chat

        run_chat(config, output)
    elif modes.prompts_file is not None:
        from dsft.cli.infer_batch import answer_file
        from dsft.infer.batch import BatchRequest

        answer_file(config, output, BatchRequest(modes.prompts_file, modes.answers_file, modes.batch_size))
    elif modes.is_filling:
        from dsft.cli.infer_fill import fill
        from dsft.infer.fill import FillRequest

        prefix = read_text_value(modes.fim_prefix, "--fim-prefix")
        suffix = read_text_value(modes.fim_suffix, "--fim-suffix")
        fill(config, output, FillRequest(prefix, suffix, modes.fim_file, modes.is_in_place))
    elif modes.is_comparing:
        from dsft.cli.infer_compare import compare

        compare(config, output, read_prompt(modes.prompt, config.is_raw, output.note))
    else:
        from dsft.cli.infer_answer import answer

        answer(config, output, read_prompt(modes.prompt, config.is_raw, output.note), is_code=modes.is_code)
