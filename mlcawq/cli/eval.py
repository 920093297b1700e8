"""`mlcawq eval`: perplexity, divergence from another model, exact answers, tasks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mlcawq.cli.bars import Bars

if TYPE_CHECKING:
    from mlcawq.evaluate.metrics import Estimate
    from mlcawq.evaluate.questions import Answered
    from mlcawq.evaluate.run import Report
    from mlcawq.evaluate.tasks import TaskScore

_WRONG_SHOWN = 10


def eval_(
    folder: Annotated[
        str, typer.Argument(help="A Hugging Face checkpoint (plain or AWQ), or a built folder.")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="Text file to predict, or wikitext2 (of the hub): gives the perplexity.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Another model of either kind, taken as the reference: its fp16 original, say.",
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            help='.jsonl of {"question", "answer"}: how many are answered exactly, greedily.',
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Tasks of lm-evaluation-harness, between commas (hellaswag,arc_easy), if it is "
            "installed.",
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option("--task-folder", help="Folder of further tasks' YAML files."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Use only so many documents of each task."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", min=0, help="Examples before each.  [default: the task's]"),
    ] = None,
    device: Annotated[
        str,
        typer.Option("--device", help="Where a built FOLDER runs: auto, cpu, cuda, vulkan:1, …"),
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option("--threads", min=1, help="Of the CPU.  [default: one for each physical core]"),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            min=2,
            help="Tokens in a window of text; windows do not overlap.  "
            "[default: 2048, or what the model or the text allows]",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=2, help="Use only this many tokens of the text."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer to a question.")
    ] = 64,
    json_output: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout.")
    ] = False,
) -> None:
    """Judge a model: how well it predicts a text, how far it is from another one, what it knows.

    --text gives the perplexity, over windows that do not overlap. With --against, also the mean
    Kullback-Leibler divergence D(reference || model), in thousandths of a nat per token, and how
    often both find the same token likeliest. --questions counts exact answers, --tasks gives what
    lm-evaluation-harness measures.

    --text wikitext2 is the protocol of the GPTQ and AWQ papers: the test split joined by empty
    lines, in windows of 2048 tokens, with the special tokens that the tokenizer itself adds.
    """
    names = () if tasks is None else tuple(dict.fromkeys(tasks.replace(",", " ").split()))
    if text is None and questions is None and not names:
        raise typer.BadParameter("give --text FILE, --questions FILE, --tasks NAMES, or several")
    if threads is not None:
        # Of TVM for built models, of torch for checkpoints: read before their first kernels.
        os.environ["TVM_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(threads)

    from mlcawq.evaluate.run import Request, evaluate
    from mlcawq.evaluate.tasks import TaskRequest

    request = Request(
        model=folder,
        against=against,
        device=device,
        text=text,
        questions=questions,
        tasks=TaskRequest(names, task_folder, limit, num_fewshot) if names else None,
        window=window,
        max_tokens=max_tokens,
        max_new_tokens=max_new_tokens,
    )
    with Bars() as progress:
        report = evaluate(request, progress)
    if json_output:
        print(json.dumps(report.as_json(), indent=2, ensure_ascii=False))
    else:
        print("\n".join(_lines(report)))


def _lines(report: Report) -> list[str]:
    rows = [("model", report.model, report.labels[0])]
    if report.against is not None:
        rows.append(("reference", report.against, report.labels[1]))
    lines = [f"{role:<10} {name} ({label})" for role, name, label in rows]
    comparison = report.comparison
    if comparison is not None:
        model, reference = comparison.model, comparison.reference
        lines += [
            "",
            f"{model.tokens} tokens predicted in {model.windows} windows of {model.window}",
            f"perplexity                {_perplexity(model.perplexity)}",
        ]
        if reference is not None and comparison.divergence is not None:
            divergence = comparison.divergence
            kl = divergence.kl
            lines += [
                f"  of the reference        {_perplexity(reference.perplexity)}",
                f"  ln(ratio)               {_plus_minus(divergence.loss_difference, 1, 5)}",
                f"KL divergence, mean       {_plus_minus(kl, 1e3, 4)} millinats/token",
                f"  median, 99 %, largest   {_fixed(divergence.kl_median * 1e3, 4)}, "
                f"{_fixed(divergence.kl_p99 * 1e3, 4)}, {_fixed(divergence.kl_max * 1e3, 4)}",
                f"same likeliest token      {_plus_minus(divergence.top1, 100, 2)} %",
            ]
    if report.answers:
        lines += ["", f"exact answers             {_right(report.answers)}"]
        if report.reference_answers:
            lines.append(f"  of the reference        {_right(report.reference_answers)}")
            expected = sum(answer.right for answer in report.reference_answers)
            if expected:
                share = sum(answer.right for answer in report.answers) / expected
                lines.append(f"  as many as it           {share:.1%}")
        wrong = [answer for answer in report.answers if not answer.right]
        for answer in wrong[:_WRONG_SHOWN]:
            question = answer.question
            lines.append(
                f"  wrong: {question.question!r}: {answer.said!r}, not {question.answer!r}"
            )
        if len(wrong) > _WRONG_SHOWN:
            lines.append(f"  and {len(wrong) - _WRONG_SHOWN} more (all of them with --json)")
    if report.tasks:
        lines += ["", *_task_lines(report)]
    return lines


def _task_lines(report: Report) -> list[str]:
    """A line a metric; the reference's number behind."""
    theirs = {(score.task, score.metric): score for score in report.reference_tasks}
    rows = []
    for score in report.tasks:
        cells = [f"{score.task} {score.metric}", _score(score)]
        reference = theirs.get((score.task, score.metric))
        if reference is not None:
            cells.append(f"(reference {_score(reference)})")
        rows.append(cells)
    width = max(24, *(len(row[0]) for row in rows))
    return [f"{name.ljust(width)}  {'  '.join(cells)}" for name, *cells in rows]


def _score(score: TaskScore) -> str:
    text = f"{score.value:.4f}"
    return text if score.standard_error is None else f"{text} ± {score.standard_error:.4f}"


def _plus_minus(estimate: Estimate, factor: float, digits: int) -> str:
    text = _fixed(estimate.mean * factor, digits)
    if estimate.standard_error is not None:
        text += f" ± {estimate.standard_error * factor:.{digits}f}"
    return text


def _fixed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # adding zero: a rounded -0.0 has no sign


def _perplexity(value: float) -> str:
    return f"{value:.4f}" if value < 1e6 else f"{value:.4e}"


def _right(answers: list[Answered]) -> str:
    right = sum(answer.right for answer in answers)
    return f"{right} of {len(answers)} ({right / len(answers):.1%})"
