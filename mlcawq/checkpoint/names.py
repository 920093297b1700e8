"""Which tensors of a checkpoint become which tensors of transformers' model, and back.

transformers renames on loading (a vision model's decoder, Mixtral's MLP) and merges (experts),
and keeps rules for it. The same rules are applied here to the names alone, with two differences:
experts stay apart, and what cannot be undone by a name (projections that a checkpoint fuses and
the model does not) is computed when the tensor is asked for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mlcawq.checkpoint.experts import (
    USUAL_NAMES,
    ExpertNames,
    Experts,
    fused_experts,
    split_fused,
)
from mlcawq.checkpoint.skeleton import Skeleton

Read = Callable[[str], torch.Tensor]

# Buffers that releases of the past stored and that are computed now.
_STALE = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|(attn|attention)\.(masked_)?bias"
    r"|position_ids|alibi)$"
)


@dataclass
class _Conversion:
    """Tensors of a checkpoint that become other ones together, by a rule of transformers."""

    rule: Any
    first: str  # the name in the model by which transformers calls this application of the rule
    sources: list[tuple[str, str]] = field(default_factory=list)  # (name, the rule's pattern)

    def apply(self, model: Any, read: Read) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import dot_natural_key

        rule = copy.deepcopy(self.rule)  # it collects tensors in itself
        # Experts are stacked as they come: the tenth after the ninth.
        for name, pattern in sorted(self.sources, key=lambda source: dot_natural_key(source[0])):
            rule.add_tensor(self.first, name, pattern, read(name))
        made = rule.convert(self.first, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class TensorMap:
    """The names of one checkpoint against those of a skeleton.

    Model names are those of the skeleton's state dict, except that experts are apart
    ("model.layers.0.mlp.experts.3.gate_proj.weight"). Checkpoint names are unquantized: the three
    tensors of a quantized linear count as its weight.

    expert_names: what the checkpoint calls an expert's projections.
    unexpected: checkpoint names that nothing in the model has a use for.
    """

    def __init__(self, skeleton: Skeleton, names: Collection[str]) -> None:
        self._skeleton = skeleton
        self._model = skeleton.model
        self._state = self._model.state_dict()
        self._fused = dict(fused_experts(self._model))
        self._stored: dict[str, str] = {}
        self._converted: dict[str, _Conversion] = {}
        self._ancestors: dict[str, str] = {}
        self.expert_names = self._expert_names()
        self.unexpected: list[str] = []
        self._read_names(names)
        self._learn_ancestors()
        self._tied = dict(self._model.all_tied_weights_keys)

    # From checkpoint to model

    def _rules(self) -> tuple[list[Any], list[Any]]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(self._model)
        return (
            [rule for rule in rules if isinstance(rule, WeightRenaming)],
            [rule for rule in rules if isinstance(rule, WeightConverter)],
        )

    def _expert_names(self) -> ExpertNames:
        """The last parts of the patterns by which transformers merges this model's experts."""
        found: dict[str, list[str]] = {}
        for rule in self._rules()[1]:
            (target, *others) = rule.target_patterns
            kind = target.rpartition(".")[2]
            if others or not any("*" in source for source in rule.source_patterns):
                continue
            leaves = [source.removesuffix(".weight") for source in rule.source_patterns]
            found.setdefault(kind, [leaf.rpartition(".")[2] for leaf in leaves])
        down = found.get("down_proj", [])
        both, up = found.get("gate_up_proj", []), found.get("up_proj", [])
        if len(down) == 1 and len(both) == 2:
            return ExpertNames(both[0], both[1], down[0])
        if len(down) == 1 and len(up) == 1:
            return ExpertNames(None, up[0], down[0])
        return USUAL_NAMES

    def _read_names(self, names: Iterable[str]) -> None:
        from transformers.core_model_loading import rename_source_key

        renamings, converters = self._rules()
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = self._model.base_model_prefix
        conversions: dict[str, _Conversion] = {}
        for name in names:
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
            if target not in self._state and name in self._state:
                target, pattern = rename_source_key(name, [], [], prefix, self._state)
            if target not in self._state:
                self.unexpected.append(name)
            elif pattern is None:
                self._stored[target] = name
            elif expert := self._expert(target, rename_source_key(name, renamings, [])[0]):
                self._stored[expert] = name
            else:
                conversion = conversions.setdefault(
                    target, _Conversion(by_pattern[pattern], target)
                )
                conversion.sources.append((name, pattern))
        for conversion in conversions.values():
            self._plan(conversion)

    def _expert(self, target: str, renamed: str) -> str | None:
        """The model name of an expert's matrix that transformers would merge into `target`."""
        experts, _, _ = target.rpartition(".")
        found = re.search(r"\.(\d+\.\w+\.(?:weight|bias))$", renamed)
        if experts not in self._fused or found is None:
            return None
        return f"{experts}.{found[1]}"

    def _plan(self, conversion: _Conversion) -> None:
        """Note every model tensor that a conversion makes."""
        targets = conversion.rule.target_patterns
        for pattern in targets:
            name = conversion.first.replace(targets[0], pattern)
            if name in self._state:
                self._converted[name] = conversion

    # Names

    def _learn_ancestors(self) -> None:
        """Modules by their model names -> by their checkpoint names, where tensors show it."""
        for name, stored in self._stored.items():
            ours, theirs = name.split("."), stored.split(".")
            while ours and theirs and ours[-1] == theirs[-1]:
                ours.pop()
                theirs.pop()
                self._ancestors.setdefault(".".join(ours), ".".join(theirs))

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a model tensor or module, existing or as it would be called."""
        if name in self._stored:
            return self._stored[name]
        head, rest = name, ""
        while head and head not in self._ancestors:
            head, _, last = head.rpartition(".")
            rest = f"{last}.{rest}" if rest else last
        known = self._ancestors.get(head, head)
        return ".".join(part for part in (known, rest) if part)

    def source_of(self, name: str) -> str | None:
        """The one checkpoint tensor that is the model tensor `name`, the other of a tied pair
        where that alone is stored; None where it is not there, or is computed from others."""
        for candidate in (name, self._tied.get(name), self._tied_to(name)):
            if candidate in self._stored:
                return self._stored[candidate]
        return None

    def holders(self, name: str) -> list[str]:
        """The checkpoint tensors that hold a model tensor together with others, sorted."""
        if name in self._converted:
            return sorted(set(self._sources(name)))
        experts = next((path for path in self._fused if name.startswith(f"{path}.")), None)
        if experts is None:
            return []
        leaf = name.split(".")[-2]
        down = leaf == self.expert_names.down
        return sorted(
            held
            for key, _ in self._fused[experts].named_parameters(recurse=False)
            if key.startswith("down_proj") == down and name.endswith("bias") == key.endswith("bias")
            for held in self._sources(f"{experts}.{key}")
        )

    def _sources(self, name: str) -> list[str]:
        if name in self._converted:
            return [source for source, _ in self._converted[name].sources]
        return [self._stored[name]] if name in self._stored else []

    def _tied_to(self, name: str) -> str | None:
        return next((target for target, source in self._tied.items() if source == name), None)

    def within(self, prefix: str) -> list[str]:
        """The checkpoint names that end up in the model's module `prefix`."""
        own = {stored for name, stored in self._stored.items() if name.startswith(f"{prefix}.")}
        for name, conversion in self._converted.items():
            if name.startswith(f"{prefix}."):
                own.update(source for source, _ in conversion.sources)
        return sorted(own)

    # Values

    def state(self, prefix: str, module: Any, read: Read) -> dict[str, torch.Tensor]:
        """The state dict of `module`, which stands at `prefix` in the model, experts apart."""
        made: dict[int, dict[str, torch.Tensor]] = {}
        result: dict[str, torch.Tensor] = {}
        for path, experts in module.named_modules():
            if isinstance(experts, Experts):
                result |= self._split(prefix, path, read, made)
        for name in module.state_dict():
            if name not in result:
                result[name] = self._value(f"{prefix}.{name}" if prefix else name, read, made)
        return result

    def _split(
        self, prefix: str, path: str, read: Read, made: dict[int, dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """The matrices of experts that the checkpoint keeps fused, by their names in the block."""
        full = f"{prefix}.{path}" if prefix else path
        fused = self._fused[full]
        names = [name for name, _ in fused.named_parameters(recurse=False)]
        held = {n: f"{full}.{n}" for n in names if self._has(f"{full}.{n}")}
        tensors = {name: self._value(key, read, made) for name, key in held.items()}
        parts = split_fused(fused, self.expert_names, tensors)
        return {f"{path}.{name}": tensor for name, tensor in parts.items()}

    def _has(self, name: str) -> bool:
        return name in self._converted or self.source_of(name) is not None

    def _value(
        self, name: str, read: Read, made: dict[int, dict[str, torch.Tensor]]
    ) -> torch.Tensor:
        source = self.source_of(name)
        if source is not None:
            return read(source)
        conversion = self._converted[name]
        if id(conversion) not in made:
            made[id(conversion)] = conversion.apply(self._model, read)
        return made[id(conversion)][name]

    # What has to be there

    def expected(self) -> Iterator[tuple[str, torch.Size, str | None]]:
        """Every tensor of the decoder: model name, shape, and where the checkpoint has it.

        The last is None where it is missing, and "" where it is computed from several.
        """
        for name, tensor in self._state.items():
            if not self._skeleton.is_text(name):
                continue
            experts, _, kind = name.rpartition(".")
            if experts in self._fused and not self._has(name):
                matrices = split_fused(self._fused[experts], self.expert_names, {kind: tensor})
                for part, matrix in matrices.items():
                    full = f"{experts}.{part}"
                    yield full, matrix.shape, self._stored.get(full)
            elif name in self._converted:
                yield name, tensor.shape, ""
            else:
                yield name, tensor.shape, self.source_of(name)

    def unmade(self, shape_of: Callable[[str], Sequence[int]]) -> Iterator[tuple[str, list[str]]]:
        """Model tensors that cannot be computed, or not in their shape, from checkpoint tensors
        of the shapes that `shape_of` tells, with the names of these."""
        made: dict[int, dict[str, torch.Tensor]] = {}
        for name, conversion in self._converted.items():
            if not self._skeleton.is_text(name):
                continue
            if id(conversion) not in made:
                try:
                    made[id(conversion)] = conversion.apply(
                        self._model, lambda source: torch.empty(*shape_of(source), device="meta")
                    )
                except (RuntimeError, ValueError, IndexError, KeyError):
                    made[id(conversion)] = {}
            found = made[id(conversion)].get(name)
            if found is None or found.shape != self._state[name].shape:
                yield name, sorted(source for source, _ in conversion.sources)

    def stale(self, name: str) -> bool:
        """Whether an unexpected tensor is one that is known to be of no use to a decoder."""
        known = self._model._keys_to_ignore_on_load_unexpected or ()
        if _STALE.search(name) or any(re.search(pattern, name) for pattern in known):
            return True
        if any(name.endswith(buffer) for buffer, _ in self._model.named_buffers()):
            return True
        # Layers that predict the tokens after the next one stand behind the decoder's own.
        text = self._model.config.get_text_config(decoder=True)
        layers, own = self.stored_name(self._skeleton.layers), len(self._skeleton.blocks)
        further = range(own, own + (getattr(text, "num_nextn_predict_layers", None) or 0))
        return name.startswith(tuple(f"{layers}.{i}." for i in further))
