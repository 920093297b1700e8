"""Our models in EleutherAI's lm-evaluation-harness: the tasks are its own, the numbers ours.

Imported only where the harness is wanted, for it must be installed (`mlcawq[lm-eval]`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mlcawq.errors import UserError
from mlcawq.evaluate.continuations import Continuation, likelihoods
from mlcawq.evaluate.folders import Kind
from mlcawq.evaluate.greedy import continue_text, named_tokens, open_continuer, tokenizer_token
from mlcawq.evaluate.scorers import open_scorer
from mlcawq.evaluate.text import open_tokenizer

_MAX_NEW_TOKENS = 256  # what the harness takes where a task does not say


class HarnessModel(TemplateLM):
    """A checkpoint or a built folder, as the harness asks models.

    Likelihoods come from a `Scorer`, block by block where the folder is a checkpoint, with
    everything of one length in one pass. Generation is greedy, and loads a checkpoint as a whole.
    """

    def __init__(
        self,
        folder: Path,
        kind: Kind,
        device: str = "auto",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self._folder, self._kind, self._where = folder, kind, device
        self._progress = progress
        self._scorer = open_scorer(folder, kind, device)
        self._text = open_tokenizer(folder)
        self._ends = named_tokens(folder, "eos", self._text)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self._ends:
            raise UserError.one(
                "no token that ends a text is named",
                str(self._folder),
                "add eos_token_id to config.json",
            )
        return self._ends[0]

    @cached_property
    def prefix_token_id(self) -> int:
        """What stands before a text without context, as the harness has it for transformers'
        models: the tokenizer's token that begins texts, or, where it has none, the one that ends
        them. What only config.json calls a beginning is not taken: Qwen's is never seen there.
        """
        begin = tokenizer_token(self._folder, "bos", self._text)
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells caches apart."""
        return str(self._folder)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, with the tokens that the tokenizer adds unless told otherwise."""
        return self._text.encode(string, special=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        asked = [Continuation(context, tokens) for _, context, tokens in requests]
        found = likelihoods(self._scorer, asked, self._progress)
        return [(one.log_probability, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once, in windows as long as the model takes."""
        windows: list[Continuation] = []
        owners: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            for pair in get_rolling_token_windows(
                token_list=self._text.encode(text, special=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._scorer.longest - 1,
                context_len=1,
            ):
                windows.append(Continuation(*make_disjoint_window(pair)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, found in zip(
            owners, likelihoods(self._scorer, windows, self._progress), strict=True
        ):
            totals[i] += found.log_probability
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Greedy answers. Raises UserError for a task that wants samples."""
        longest = self._scorer.longest
        continuer = open_continuer(self._folder, self._kind, self._where, longest)
        answers = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise UserError.one(
                    "wants answers that are drawn at random, and these are greedy",
                    f"--tasks {request.task_name}",
                    "choose another task",
                )
            until = options.get("until") or []
            new = min(int(options.get("max_gen_toks", _MAX_NEW_TOKENS)), longest - 1)
            prompt = self._text.encode(context)[-(longest - new) :]
            answers.append(
                continue_text(
                    continuer,
                    self._text,
                    prompt or [self.prefix_token_id],
                    until=[until] if isinstance(until, str) else until,
                    ends=self._ends,
                    max_new_tokens=new,
                )
            )
            if self._progress is not None:
                self._progress(len(answers), len(requests))
        return answers
