"""Operations, memory traffic and collectives of a compiled program, from its HLO (`compiled.as_text()`).

`compiled.cost_analysis()` counts the body of a loop once, does not separate a TPU's on-chip memory from its
main memory, and leaves collectives out. Here each instruction counts as often as a step runs it.
"""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")


class Shape(NamedTuple):
    """An array's type, dimensions and memory space, 0 for the main memory of the device."""

    dtype: str
    dims: tuple[int, ...]
    memory: int

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype).group())
        return math.prod(self.dims) * bits // 8


@dataclasses.dataclass
class Instruction:
    """An instruction of a compiled program.

    Attributes:
      shapes: shapes of the result; a tuple has several, and nested tuples are flattened.
      computation: name of the computation that lists the instruction.
      number: of a parameter, its position among the operands of the caller.
      parts: instructions of the computation that a fusion calls, whose last one is its result.
      turns: of a loop, the number of times that its body runs for each run of the loop, if known.
      times: number of times that a step runs the instruction.
      inside: True for a part of another instruction, such as a fusion, which touches no memory itself.
    """

    name: str
    shapes: list[Shape]
    opcode: str
    operands: list[str]
    attributes: str
    computation: str
    number: int | None = None
    parts: list["Instruction"] = dataclasses.field(default_factory=list)
    turns: int | None = None
    times: int = 0
    inside: bool = False

    def called(self, role: str) -> str:
        """Return the name of the computation that the instruction calls as its "body" or "condition"."""
        return re.search(rf"\b{role}=%?([\w.\-]+)", self.attributes)[1]


_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_CALLED = re.compile(r"(?:body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.\-]+)")
_LENGTH = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')

_CONTROL = ("while", "call", "conditional")
_NO_KERNEL = (*_CONTROL, "parameter", "constant", "bitcast", "tuple", "get-tuple-element")


def read_program(text: str, unknown_turns: int | None = None) -> dict[str, Instruction]:
    """Return all instructions of an optimised HLO module by their names, which are unique in a module.

    Args:
      text: the module, as `compiled.as_text()` returns it.
      unknown_turns: number of turns to count for a loop whose length the compiler does not know; None to
        refuse such a loop.

    Raises:
      ValueError: the compiler does not know the length of a loop, and `unknown_turns` is None.
    """
    computations: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else None
        elif computations and (match := _INSTRUCTION.match(line)):
            shapes = [
                Shape(dtype, tuple(int(size) for size in dims.split(",") if size), int(memory or 0))
                for dtype, dims, memory in _SHAPE.findall(match[2])
            ]
            operands = re.findall(r"%([\w.\-]+)", match[4])
            number = int(match[4]) if match[3] == "parameter" else None
            computations[name].append(
                Instruction(match[1], shapes, match[3], operands, match[5], name, number)
            )
    times, inside = dict.fromkeys(computations, 0), dict.fromkeys(computations, False)
    times[entry] = 1
    # A module lists a computation before its callers: in reverse, each caller's count is complete first.
    for name, instructions in reversed(computations.items()):
        for each in instructions:
            each.times, each.inside = count, within = times[name], inside[name]
            if each.opcode == "while" and count:
                if (length := _LENGTH.search(each.attributes)) is not None:
                    each.turns = int(length[1])
                elif unknown_turns is None:
                    raise ValueError(f"{each.name}: the compiler does not know the length of this loop")
                count *= unknown_turns if each.turns is None else each.turns
            for called in _CALLED.findall(each.attributes):
                for callee in re.findall(r"[\w.\-]+", called):
                    if callee in times:
                        times[callee] += count
                        inside[callee] = within or each.opcode not in _CONTROL
                        if each.opcode == "fusion":
                            each.parts = computations[callee]
    return {each.name: each for instructions in computations.values() for each in instructions}


def operations(program: dict[str, Instruction]) -> int:
    """Return 2 × multiply-adds of matrix products and convolutions, without zeros of padding and dilation."""
    count = 0
    for each in program.values():
        if each.opcode in ("dot", "convolution") and each.times:
            out, lhs, rhs = (program[name].shapes[0].dims for name in (each.name, *each.operands))
            multiply_adds = _dot if each.opcode == "dot" else _convolution
            count += 2 * each.times * multiply_adds(out, lhs, rhs, each.attributes)
    return count


def _dot(out: tuple, lhs: tuple, rhs: tuple, attributes: str) -> int:
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes)[1]
    return math.prod(out) * math.prod(lhs[int(axis)] for axis in contracted.split(",") if axis)


def _convolution(out: tuple, lhs: tuple, rhs: tuple, attributes: str) -> int:
    """Return the multiply-adds of a convolution.

    Along each spatial axis, count the pairs of an output and a kernel position that read an input entry.
    """
    of_lhs, of_rhs, of_out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes).groups()
    # A TPU's compiler writes matrix products as convolutions without a window, or with the batch as window.
    window = dict(re.findall(r"[{ ](\w+)=([\dx_\-]+)", "".join(re.findall(r"window=\{[^}]*\}", attributes))))
    count = out[of_out.index("b")] * out[of_out.index("f")] * rhs[of_rhs.index("i")]
    for axis, size in enumerate(window["size"].split("x") if "size" in window else ()):

        def window_field(name, default, axis=axis):
            return int(window[name].split("x")[axis].split("_")[0]) if name in window else default

        stride, rhs_dilation, lhs_dilation = (
            window_field(name, 1) for name in ("stride", "rhs_dilate", "lhs_dilate")
        )
        positions = (
            o * stride + k * rhs_dilation - window_field("pad", 0)
            for o in range(out[of_out.index(str(axis))])
            for k in range(int(size))
        )
        length = lhs[of_lhs.index(str(axis))]
        # Positions between entries, or outside of the array, hold zeros of dilation or padding.
        count *= sum(p % lhs_dilation == 0 and 0 <= p // lhs_dilation < length for p in positions)
    return count


def collectives(program: dict[str, Instruction]) -> list[dict]:
    """Return the collectives between devices; identical ones are one row with a count."""
    counts: dict[tuple, int] = {}
    for each in program.values():
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES and each.times:
            size = sum(shape.bytes for name in each.operands for shape in program[name].shapes)
            groups = re.search(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])", each.attributes)
            devices = None if groups is None else int(groups[2] or len(groups[1].split(",")))
            if devices != 1:
                counts[kind, size, devices] = counts.get((kind, size, devices), 0) + each.times
    names = ("kind", "bytes", "devices", "times")
    return [dict(zip(names, (*key, times), strict=True)) for key, times in counts.items()]


def traffic(program: dict[str, Instruction]) -> int:
    """Return the bytes that a step reads from and writes to main memory."""
    return sum(each.times * size for each, _, size in accesses(program))


def accesses(program: dict[str, Instruction]) -> Iterator[tuple[Instruction, Shape, int]]:
    """Yield the operands and results in main memory of each instruction, with the bytes that it touches.

    That is all bytes of an array, except where a loop's body reads one entry of a stacked array or writes one
    in place. A TPU's program marks arrays in on-chip memory and copies them there by separate instructions.
    Collectives are left out, because their traffic is part of their transfer time.
    """
    for each in program.values():
        opcode = each.opcode
        kind = opcode.removesuffix("-start")
        if not each.times or each.inside or opcode.endswith("-done") or kind in (*_NO_KERNEL, *COLLECTIVES):
            continue
        if opcode in ("copy-start", "slice-start"):
            ends = each.shapes[:2]  # a slice's operand is the whole array, so take the smaller end
            moved = [(end, min(end.bytes for end in ends)) for end in ends]
        else:
            moved = [*_read(program, each), *_written(program, each)]
        yield from ((each, shape, size) for shape, size in moved if shape.memory == 0)


def _read(program: dict[str, Instruction], each: Instruction) -> Iterator[tuple[Shape, int]]:
    """Yield the shapes of an instruction's operands, with the bytes that it reads of each."""
    parameters = {part.number: part.name for part in each.parts if part.opcode == "parameter"}
    for position, name in enumerate(each.operands):
        users = _users(each.parts, parameters[position]) if each.parts else [(each, position)]
        for shape in program[name].shapes:
            size = sum(_read_by(user, place, shape) for user, place in users)
            yield shape, min(size, shape.bytes)


def _users(parts: list[Instruction], name: str) -> list[tuple[Instruction, int]]:
    """Return the parts that use a part, or a bitcast of it, and at which position of their operands."""
    users = []
    for part in parts:
        for position, operand in enumerate(part.operands):
            if operand == name:
                users += _users(parts, part.name) if part.opcode == "bitcast" else [(part, position)]
    return users


def _read_by(user: Instruction, position: int, shape: Shape) -> int:
    if user.opcode in ("dynamic-slice", "dynamic-update-slice") and position == 0:
        return user.shapes[0].bytes if user.opcode == "dynamic-slice" else 0
    return shape.bytes


def _written(program: dict[str, Instruction], each: Instruction) -> Iterator[tuple[Shape, int]]:
    """Yield the shapes of an instruction's results, with the bytes that it writes of each."""
    root = each.parts[-1] if each.parts else each
    results = [program[name] for name in root.operands] if root.opcode == "tuple" else [root]
    # A result may be a tuple within the tuple.
    results = [result for result in results for _ in result.shapes]
    for shape, result in zip(each.shapes, results, strict=True):
        result = _before_bitcasts(program, result)
        size = shape.bytes
        if result.opcode == "dynamic-update-slice":
            base, update = (program[name] for name in result.operands[:2])
            # In an array that the fusion creates itself, it writes all other entries as well.
            if not each.parts or _before_bitcasts(program, base).opcode == "parameter":
                size = update.shapes[0].bytes
        elif result.opcode == "custom-call" and shape.dtype in ("s8", "u8"):
            size = 0  # the workspace of a library, which may use little of it
        yield shape, size


def _before_bitcasts(program: dict[str, Instruction], each: Instruction) -> Instruction:
    while each.opcode == "bitcast":
        each = program[each.operands[0]]
    return each


def kernels(program: dict[str, Instruction]) -> list[Instruction]:
    """Return the instructions that a GPU runs, each of which is at least one launch.

    The condition of a loop of known length is not evaluated there.
    """
    conditions = {each.called("condition") for each in loops(program) if each.turns is not None}
    return [
        each
        for each in program.values()
        if each.times
        and not each.inside
        and each.computation not in conditions
        and each.opcode not in _NO_KERNEL
        and not each.opcode.endswith("-done")
    ]


def loops(program: dict[str, Instruction]) -> list[Instruction]:
    """Return the loops that a step runs."""
    return [each for each in program.values() if each.opcode == "while" and each.times]


def cycles(program: dict[str, Instruction]) -> int:
    """Return the sum of a TPU compiler's cycle estimates, or 0 where the program has none."""
    estimates = (
        (each.times, _CYCLES.search(each.attributes)) for each in program.values() if not each.inside
    )
    return sum(times * int(match[1]) for times, match in estimates if match)
