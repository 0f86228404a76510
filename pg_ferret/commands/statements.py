"""The statements of a write, and what each of them alone tells of the document that it was to store.

Only for writes that failed: a duplicate key's values are what the statement says, and no more than that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from bson.raw_bson import RawBSONDocument
from bson.regex import Regex

from pg_ferret.commands import documents
from pg_ferret.wire import bson
from pg_ferret.wire.message import Request

# A value that the engine has made out of a stored document, or that is one of several.
UNKNOWN: Final = object()
_NOTHING: Final[Mapping[str, Any]] = {}
# Operator, path, value.
_Change = tuple[str, str, Any]


class Index(NamedTuple):
    """What decides about duplicate keys."""

    name: str
    pattern: Mapping[str, Any]
    partial: bool = False  # a document may also come into it by a change of another field


class Statement(NamedTuple):
    """One document to store, or one change."""

    change: Any  # the document or replacement, or the update: operators or a pipeline
    filter: Mapping[str, Any] = _NOTHING
    upsert: bool = False  # stores a new document if the filter finds none
    multi: bool = False

    @classmethod
    def of_update(cls, statement: Mapping[str, Any]) -> Statement:
        """From an item of the update command's ``updates``."""
        return cls._of(statement, "q", "u")

    @classmethod
    def of_find_and_modify(cls, command: Mapping[str, Any]) -> Statement:
        """From the whole command."""
        return cls._of(command, "query", "update")

    @classmethod
    def _of(cls, fields: Mapping[str, Any], query: str, change: str) -> Statement:
        found = fields.get(query)
        where = found if isinstance(found, Mapping) else _NOTHING
        return cls(fields.get(change), where, bool(fields.get("upsert")), bool(fields.get("multi")))

    def values(self, index: Index) -> dict[str, Any]:
        """The values that the document was to have in an index; `UNKNOWN` where the statement does not say."""
        paths = list(index.pattern)
        changes = self._changes_of(paths)
        # If nothing of the index is changed in a document that is there, only a new one can have failed.
        new = self.upsert and not index.partial and all(operator == "$setOnInsert" for operator, _, _ in changes)
        return {path: self._value(path, changes, new) for path in paths}

    def _changes_of(self, paths: Iterable[str]) -> list[_Change]:
        """The changes that one of these paths may be hit by; in one pass, because an update may be of any length."""
        heads = {path.partition(".")[0] for path in paths}
        changes = [change for change in _changes(self.change) if change[1].partition(".")[0] in heads]
        return [change for change in changes if any(_meet(change[1], path) for path in paths)]

    def _value(self, path: str, changes: list[_Change], new: bool) -> Any:
        if not isinstance(self.change, Mapping):
            return UNKNOWN
        if not _has_operators(self.change):
            # A replacement keeps the _id of the document.
            kept = path == "_id" and path not in self.change
            return self._left_alone(path, new=False) if kept else _lookup(self.change, path)
        touching = [change for change in changes if _meet(change[1], path)]
        if not touching:
            return self._left_alone(path, new)
        (operator, field, value), *more = touching
        if more or not (operator == "$set" or (operator == "$setOnInsert" and new)):
            return UNKNOWN
        if field == path:
            return _single(value)
        if path.startswith(field + ".") and isinstance(value, Mapping):
            return _lookup(value, path[len(field) + 1 :])
        return UNKNOWN

    def _left_alone(self, path: str, new: bool) -> Any:
        """The value of a path that is not changed; a new document has what was looked for, and lacks what was not."""
        equal, _ = _equalities(self.filter)
        if path in equal and (new or path == "_id"):
            return _single(equal[path])
        return None if new and not any(_meet(field, path) for field in _mentioned(self.filter)) else UNKNOWN

    def raced(self, index: Index) -> bool:
        """Whether a duplicate key in this index may mean that another one has just stored what this one looked for.

        So it is if an upsert's filter asks for exactly these values and nothing else: then it finds it now.
        """
        equal, all_of_it = _equalities(self.filter)
        values = self.values(index)
        return (
            all_of_it
            and bool(index.pattern)
            and not index.partial
            and equal.keys() == values.keys()
            and all(_same(value, equal[path]) for path, value in values.items())
        )


class Statements:
    """The statements of a write command; found once, not for each that failed."""

    def __init__(self, request: Request, name: bytes) -> None:
        self._are_documents = name == b"documents"
        sequence = request.sequences.get(name)
        kind, start, end = request.fields.get(name, bson.MISSING)
        self._items: list[memoryview] = []
        if sequence is not None:
            self._items = list(bson.split_sequence(sequence))
        elif kind == bson.ARRAY:
            self._items = list(bson.split_array(request.frame, start, end))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Statement:
        statement = RawBSONDocument(bytes(self._items[index]), documents.OPTIONS)
        return Statement(statement) if self._are_documents else Statement.of_update(statement)


def _has_operators(change: Mapping[str, Any]) -> bool:
    return any(name.startswith("$") for name in change)


def _changes(update: Any) -> Iterator[_Change]:
    """Operator, path and value of all changes; of a rename both paths."""
    for operator, fields in update.items() if isinstance(update, Mapping) else ():
        for field, value in fields.items() if isinstance(fields, Mapping) else ():
            yield operator, field, value
            if operator == "$rename" and isinstance(value, str):
                yield operator, value, field


def _meet(field: str, path: str) -> bool:
    """Whether a change of ``field`` may change what is at ``path``; what stands for places in an array matches any."""
    for one, other in zip(field.split("."), path.split("."), strict=False):
        if one.startswith("$") or one.isdecimal():
            return True
        if one != other:
            return False
    return True


def _equalities(where: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The paths that a filter gives a value, and whether it asks for nothing else."""
    equal: dict[str, Any] = {}
    all_of_it = True
    for name, condition in where.items():
        if name == "$comment":
            continue
        if name == "$and" and isinstance(condition, list):
            for part in condition:
                more, nothing_else = _equalities(part) if isinstance(part, Mapping) else ({}, False)
                all_of_it = all_of_it and nothing_else and equal.keys().isdisjoint(more)
                equal |= more
        elif name.startswith("$") or isinstance(condition, Regex):
            all_of_it = False
        elif not isinstance(condition, Mapping) or not _has_operators(condition):
            equal[name] = condition
        elif len(condition) == 1 and "$eq" in condition:
            equal[name] = condition["$eq"]
        else:
            all_of_it = False
    return equal, all_of_it


def _mentioned(where: Mapping[str, Any]) -> Iterator[str]:
    """All paths in a filter."""
    for name, condition in where.items():
        if not name.startswith("$"):
            yield name
        for part in condition if isinstance(condition, list) else ():
            if isinstance(part, Mapping):
                yield from _mentioned(part)


def _lookup(document: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, None if it is missing, as MongoDB indexes it; `UNKNOWN` within an array."""
    value: Any = document
    for part in path.split("."):
        if isinstance(value, list):
            return UNKNOWN
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return _single(value)


def _single(value: Any) -> Any:
    """An array has an entry in the index for each of its items."""
    if not isinstance(value, list):
        return value
    return value[0] if len(value) == 1 else UNKNOWN


def _same(one: Any, other: Any) -> bool:
    """Python takes 1 and True for the same."""
    return type(one) is type(other) and bool(one == other)
