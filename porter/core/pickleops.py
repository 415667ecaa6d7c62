"""The language of pickles, run by a machine of ours that knows data and nothing else.

Python's own unpickler hashes, compares and sets the state of whatever a file makes it build, which is enough to take
all of a machine's time and memory without running any code. Here every opcode does a bounded amount of work on values
that we made: names are only names, an object is a placeholder without state, and a table takes texts and small numbers
as its keys.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
from collections.abc import Callable
from typing import IO, Any

MAX_OPCODES = 2_000_000  # torch.save takes 32 for a tensor: 50,000 tensors have 1.6 million
MAX_RANK = 32  # as in the headers of safetensors
MAX_KEY = 2**31
_MAX_NAMES = 1000
_MEMO_GAP = 1024  # older writers begin at 1, or leave a number out
STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2", "ComplexFloatStorage": "C64",
    "TypedStorage": "U8", "UntypedStorage": "U8",
}  # fmt: skip
DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "uint8": "U8",
    "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4,
         "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8, "C64": 8}  # fmt: skip
_PLAIN = frozenset((
    ("torch", "Size"), ("torch", "device"), ("builtins", "set"), ("__builtin__", "set"),
))  # fmt: skip


class Refused(pickle.UnpicklingError):
    """The pickle does what a state dict does not."""


class Cut(Exception):
    """The text ends, or goes wrong, in the middle of an opcode."""


class Name:
    """What a file names; never looked up."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name


class Storage:
    """One storage: its dtype, its key in the file and its bytes."""

    __slots__ = ("dtype", "key", "nbytes")

    def __init__(self, dtype: str, key: str, nbytes: int) -> None:
        self.dtype, self.key, self.nbytes = dtype, key, nbytes


class Tensor:
    """A view of a storage; `nbytes` are its own, `offset` and `stride` count elements of the storage."""

    __slots__ = ("dtype", "nbytes", "offset", "shape", "storage", "stride")

    def __init__(
        self, dtype: str, shape: tuple[int, ...], nbytes: int, storage: Storage, offset: int, stride: tuple[int, ...]
    ) -> None:
        self.dtype, self.shape, self.nbytes, self.storage = dtype, shape, nbytes, storage
        self.offset, self.stride = offset, stride

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in row-major order, one after the other."""
        step = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size > 1 and stride != step:
                return False
            step *= size
        return True


THING = Name("", "")  # any object: it has no state, so that one will do


def _check_text(stream: IO[bytes]) -> None:
    """Refuse a next opcode that is text with a backslash: Python would decode it as an escape, with a warning."""
    at = stream.tell()
    if stream.read(1) in (b"S", b"P", b"i", b"c") and b"\\" in stream.readline() + stream.readline():
        raise Refused("a name with a backslash")
    stream.seek(at)


class Machine:
    """Runs one pickle. `position` is where the text was understood up to; `others` collects the names of code."""

    def __init__(self, others: set[str], position: int = 0) -> None:
        self.others, self.position = others, position
        self.storages: dict[str, Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._puts = self._count = 0

    def run(self, stream: IO[bytes]) -> Any:
        """The object; may be called again with more text after `Cut`.

        Raises:
            Refused: the pickle does what a state dict does not, or takes more than `MAX_OPCODES` opcodes.
            Cut: it does not end, or an opcode of it is none.
        """
        stream.seek(self.position)
        opcodes = pickletools.genops(stream)
        while True:
            _check_text(stream)
            try:
                opcode, argument, _ = next(opcodes)
            except (ValueError, EOFError, struct.error, IndexError, StopIteration) as error:
                raise Cut(str(error)) from None
            self._count += 1
            if self._count > MAX_OPCODES:
                raise Refused(f"more than {MAX_OPCODES} opcodes")
            try:
                if opcode.name == "STOP":
                    return self._stack.pop()
                _DO[opcode.name](self, argument)
            except KeyError:
                raise Refused(f"the opcode {opcode.name}") from None
            except (IndexError, TypeError, ValueError) as error:
                raise Refused(f"the opcode {opcode.name}: {error}") from None
            finally:
                self.position = stream.tell()

    def _top(self, count: int) -> list[Any]:
        """Takes `count` values off the stack."""
        if count > len(self._stack) - (self._marks[-1] if self._marks else 0):
            raise Refused("a value that is not there")
        values = self._stack[-count:]
        del self._stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        """Takes off what lies above the last mark."""
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def push(self, value: Any) -> None:
        if isinstance(value, int) and value.bit_length() > 128:
            raise Refused(f"a number of {value.bit_length()} bits")
        self._stack.append(value)

    def mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def pop(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._stack.pop()

    def put(self, index: Any) -> None:
        """`index` None: the next free one."""
        self._puts += 1
        place = len(self._memo) if index is None else int(index)
        if not 0 <= place <= self._puts + _MEMO_GAP:
            raise Refused("a memo index out of line")
        while len(self._memo) <= place:
            self._memo.append(None)
        self._memo[place] = self._stack[-1]

    def get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    def items(self, pairs: list[Any]) -> None:
        """Keys and values in turn, into the table on the stack; what a state dict never has as a key is left out."""
        table = self._stack[-1]
        if len(pairs) % 2:
            raise Refused("a key without a value")
        if isinstance(table, dict):
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                if isinstance(key, str) or (type(key) is int and -MAX_KEY < key < MAX_KEY):
                    table[key] = value
                elif isinstance(value, Tensor | dict | list | tuple) and not isinstance(key, Name):
                    raise Refused("a key that is neither a text nor a small number")

    def extend(self, values: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(values)

    def build(self, _: Any) -> None:
        """State: what a table has besides its content (`_metadata`) is left out; a tensor has none."""
        target, _state = self._stack[-2], self._stack.pop()
        if not isinstance(target, dict | list) and target is not THING:
            raise Refused("a state for what has none")

    def named(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("a name that is no text")
        if not _known(module, name) and len(self.others) < _MAX_NAMES:
            full = f"{module[:60]}.{name[:60]}"
            self.others.add(full if full.isprintable() else ascii(full)[1:-1])
        self._stack.append(Name(module, name))

    def call(self, target: Any, given: Any, depth: int = 0) -> Any:
        """The result of calling what a file names: one of five things that we know, or a placeholder."""
        values = given if isinstance(given, tuple) else ()
        if not isinstance(target, Name):
            return THING
        module, name = target.module, target.name
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return rebuild(values, name)
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return values[0] if values else None
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2") and len(values) > 2 and depth < 4:
            return self.call(values[0], values[2], depth + 1)
        if (module, name) == ("collections", "OrderedDict"):
            table: dict[Any, Any] = {}
            pairs = values[0] if values and isinstance(values[0], list | tuple) else ()
            self._count += len(pairs)  # a list that was made once can be copied by every opcode
            self._stack.append(table)
            for pair in pairs:
                if isinstance(pair, list | tuple) and len(pair) == 2:
                    self.items(list(pair))
            return self._stack.pop()
        return THING

    def storage(self, pid: Any) -> Storage:
        """Stands for the persistent id ("storage", type, key, place, elements, …)."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Name):
            raise Refused("a storage that is described badly")
        kind, key, elements = STORAGES.get(pid[1].name) if pid[1].module.startswith("torch") else None, pid[2], pid[4]
        if kind is None or not isinstance(key, str | int) or type(elements) is not int or not 0 <= elements < 2**48:
            raise Refused("a storage that is described badly")
        known = self.storages.get(key := str(key))
        if known is None:
            known = self.storages[key] = Storage(kind, key, elements * BYTES[kind])
        elif (known.dtype, known.nbytes) != (kind, elements * BYTES[kind]):
            raise Refused(f"the storage {key[:20]!r} is described twice, and not alike")
        return known


def rebuild(values: tuple[Any, ...], name: str) -> Tensor:
    """Stands for torch._utils._rebuild_tensor_v2(storage, offset, size, stride, …); _v3 has the dtype as well."""
    if len(values) < 4 or not isinstance(values[0], Storage):
        raise Refused("a tensor without a storage")
    storage, offset, size, stride = values[:4]
    dtype: str | None = storage.dtype
    if name.endswith("_v3"):
        last = values[6] if len(values) > 6 and isinstance(values[6], Name) else None
        dtype = DTYPES.get(last.name) if last and last.module == "torch" else None
    if dtype is None:
        raise Refused("a tensor of no dtype that is known")
    for numbers in (size, stride):
        if not isinstance(numbers, tuple | list) or len(numbers) > MAX_RANK or len(numbers) != len(size):
            raise Refused(f"a tensor that has not 0 to {MAX_RANK} dims")
        if not all(type(number) is int and 0 <= number < 2**48 for number in (offset, *numbers)):
            raise Refused("a tensor of an impossible size")
    width, count, last_element = BYTES[dtype], 1, offset
    for number, step in zip(size, stride, strict=True):
        count *= number
        last_element += (number - 1) * step
    if count and (last_element + 1) * width > storage.nbytes:
        raise Refused(f"a tensor that needs {(last_element + 1) * width} bytes of a storage of {storage.nbytes}")
    return Tensor(dtype, tuple(size), count * width, storage, offset, tuple(stride))


def _known(module: str, name: str) -> bool:
    """Whether a name is one that state dicts have, and no sign of code."""
    if module == "torch._utils":
        return name.startswith(("_rebuild_parameter", "_rebuild_tensor"))
    return (
        (module, name) in _PLAIN
        or (module, name) in (("collections", "OrderedDict"), ("torch._tensor", "_rebuild_from_type_v2"))
        or (module in ("torch", "torch.storage") and name in STORAGES)
        or (module == "torch" and name in DTYPES)
    )


def _taking(count: int, do: Callable[[Machine, list[Any]], Any]) -> Callable[[Machine, Any], None]:
    """An opcode that takes `count` values (-1: up to the mark) and gives one."""

    def run(machine: Machine, _: Any) -> None:
        values = machine._marked() if count < 0 else machine._top(count) if count else []
        machine._stack.append(do(machine, values))

    return run


def _table(machine: Machine, values: list[Any]) -> dict[Any, Any]:
    machine._stack.append({})
    machine.items(values)
    table: dict[Any, Any] = machine._stack.pop()
    return table


def _instance(machine: Machine, argument: Any) -> None:
    values = machine._marked()
    machine.named(*argument.split(" ", 1))
    machine._stack[-1] = machine.call(machine._stack[-1], tuple(values))


_DO: dict[str, Callable[[Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, a: None),
    **dict.fromkeys(
        ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
         "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
         "BINBYTES8", "BYTEARRAY8"), Machine.push,
    ),
    "NONE": lambda m, a: m.push(None),
    "NEWTRUE": lambda m, a: m.push(True),
    "NEWFALSE": lambda m, a: m.push(False),
    "MARK": Machine.mark,
    "POP": Machine.pop,
    "POP_MARK": lambda m, a: m._marked(),
    "DUP": lambda m, a: m._stack.append(m._stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Machine.get),
    "EMPTY_LIST": _taking(0, lambda m, v: v),
    "EMPTY_TUPLE": _taking(0, lambda m, v: ()),
    "EMPTY_DICT": _taking(0, lambda m, v: {}),
    "EMPTY_SET": _taking(0, lambda m, v: THING),
    "FROZENSET": _taking(-1, lambda m, v: THING),
    "LIST": _taking(-1, lambda m, v: v),
    "TUPLE": _taking(-1, lambda m, v: tuple(v)),
    "TUPLE1": _taking(1, lambda m, v: tuple(v)),
    "TUPLE2": _taking(2, lambda m, v: tuple(v)),
    "TUPLE3": _taking(3, lambda m, v: tuple(v)),
    "DICT": _taking(-1, _table),
    "APPEND": lambda m, a: m.extend(m._top(1)),
    "APPENDS": lambda m, a: m.extend(m._marked()),
    "ADDITEMS": lambda m, a: m._marked(),
    "SETITEM": lambda m, a: m.items(m._top(2)),
    "SETITEMS": lambda m, a: m.items(m._marked()),
    "BUILD": Machine.build,
    "GLOBAL": lambda m, a: m.named(*a.split(" ", 1)),
    "STACK_GLOBAL": lambda m, a: m.named(*m._top(2)),
    "REDUCE": _taking(2, lambda m, v: m.call(v[0], v[1])),
    "NEWOBJ": _taking(2, lambda m, v: m.call(v[0], v[1])),
    "NEWOBJ_EX": _taking(3, lambda m, v: m.call(v[0], v[1])),
    "OBJ": _taking(-1, lambda m, v: m.call(v[0], tuple(v[1:]))),
    "INST": _instance,
    "BINPERSID": _taking(1, lambda m, v: m.storage(v[0])),
}  # fmt: skip
