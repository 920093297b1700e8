"""Prompt formats as the publishers of models have them; a module a family.

A module says where its formats were published, and holds them in PUBLISHED (Jinja chat templates)
and DOCUMENTED (formats that are only described). They are collected here, so that a new family is
a new file.
"""

from __future__ import annotations

import importlib
import pkgutil

from published_templates.case import Documented, Published

_MODULES = [
    importlib.import_module(f"{__name__}.{found.name}")
    for found in pkgutil.iter_modules(__path__)
    if found.name != "case"
]
PUBLISHED: list[Published] = [p for m in _MODULES for p in getattr(m, "PUBLISHED", ())]
DOCUMENTED: list[Documented] = [d for m in _MODULES for d in getattr(m, "DOCUMENTED", ())]


def published(name: str) -> Published:
    """The first published template that the shipped file `name` renders."""
    return next(case for case in PUBLISHED if case.name == name)
