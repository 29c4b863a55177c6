"""What PTX's instructions compute, as expressions of C. Those that meet memory or other threads are elsewhere.

Every instruction is known with the number of its operands. One that is not is an error, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .ptx import Instruction, NotUnderstood

#: Comparisons: of C's, and whether they hold if one side is NaN.
COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip

INTEGER = r"(?P<T>[sub](?:8|16|32|64))"
FLOAT = r"(?P<T>f32|f64|f16|bf16)"
#: Two numbers in one register.
PAIR = r"(?P<T>f32|f16|bf16)x2"


def width(kind: str) -> int:
    """The bits of a type: 16 for bf16."""
    return int(re.findall(r"\d+", kind)[0]) * (2 if kind.endswith("x2") else 1)


def is_integer(kind: str) -> bool:
    return re.fullmatch(r"[sub]\d+", kind) is not None


def _number(kind: str, value: str, flush: bool = False) -> str:
    """The number that bits stand for."""
    number = f"from_{kind}({value})"
    return f"ftz({number})" if flush and kind == "f32" else number


def _bits(kind: str, value: str, flush: bool = False) -> str:
    return f"to_{kind}(ftz({value}))" if flush and kind == "f32" else f"to_{kind}({value})"


def _wide(kind: str) -> str:
    """The C type in which numbers of a type are computed: results have to be rounded only once."""
    return "float" if kind == "f32" else "double"


def _arithmetic(m: re.Match[str], a: list[str]) -> str:
    kind, flush = m["T"], bool(m["ftz"])
    x = [f"({_wide(kind)}){_number(kind, value, flush)}" for value in a]
    fma = "fmaf" if kind == "f32" else "fma"
    value = {"fma": lambda: f"{fma}({x[0]}, {x[1]}, {x[2]})", "add": lambda: f"{x[0]} + {x[1]}",
             "sub": lambda: f"{x[0]} - {x[1]}", "mul": lambda: f"{x[0]} * {x[1]}"}[m["op"]]()  # fmt: skip
    return _bits(kind, value, flush)


def _pair(m: re.Match[str], a: list[str]) -> str:
    """The instruction for both halves."""
    half = width(m["T"])
    parts = []
    for shift in (0, half):
        one = re.fullmatch(_ARITHMETIC, f"{m['op']}.{m['T']}")
        assert one is not None
        parts.append(f"(b{2 * half}){_arithmetic(one, [f'(u{half})(({value}) >> {shift})' for value in a])} << {shift}")
    return " | ".join(parts)


def _mixed(m: re.Match[str], a: list[str]) -> str:
    """A number of 16 bits, and one of 32 that is added to it or subtracted from it, from sm_100 on."""
    x, y = _number(m["T"], a[0]), _number("f32", a[1])
    return _bits("f32", f"{x} {'+' if m['op'] == 'add' else '-'} {y}")


def _extreme(m: re.Match[str], a: list[str]) -> str:
    """Of two values, or of three from sm_100 on."""
    kind = m["T"]
    name = f"{m['op']}_{'nan_' if m['nan'] else ''}{'f64' if kind == 'f64' else 'f32'}"
    x = [_number(kind, value, bool(m["ftz"])) for value in a]
    value = f"{name}({x[0]}, {x[1]})"
    return _bits(kind, value if len(x) == 2 else f"{name}({value}, {x[2]})", bool(m["ftz"]))


def _compare(m: re.Match[str], a: list[str]) -> str:
    kind, test = m["T"], m["test"]
    if is_integer(kind):
        return f"({kind})({a[0]}) {COMPARISONS[test]} ({kind})({a[1]})"
    x, y = (_number(kind, value, bool(m["ftz"])) for value in a)
    nan = f"({x} != {x} || {y} != {y})"
    if test in ("num", "nan"):
        return nan if test == "nan" else f"!{nan}"
    if len(test) == 3:  # unordered: equ, neu, ...
        return f"{nan} || {x} {COMPARISONS[test[:2]]} {y}"
    return f"!{nan} && {x} {COMPARISONS[test]} {y}"


def _convert(m: re.Match[str], a: list[str]) -> str:
    to, source, rounding, flush = m["D"], m["S"], m["round"], bool(m["ftz"])
    if is_integer(to) and is_integer(source):
        return f"({to})({source})({a[0]})"
    if is_integer(source):
        if rounding != "rn":
            raise NotUnderstood(f"rounds an integer by {rounding}")
        return _bits(to, f"({'float' if to == 'f32' else 'double'})({source})({a[0]})")
    value = _number(source, a[0], flush)
    if rounding and rounding.endswith("i"):
        function = {"rmi": "floor", "rpi": "ceil", "rzi": "trunc", "rni": "rint"}[rounding]
        value = f"{function}({value})"
    elif rounding not in ("rn", None):
        raise NotUnderstood(f"rounds a number by {rounding}")
    return _bits(to, value, flush) if not is_integer(to) else f"to_{to}({value})"


def _convert_pair(m: re.Match[str], a: list[str]) -> str:
    """Two numbers become the upper and the lower half of a register."""
    upper, lower = (_bits(m["D"], f"from_f32({value})") for value in a)
    return f"(u32){upper} << 16 | {lower}"


def _approximate(m: re.Match[str], a: list[str]) -> str:
    flush = bool(m["ftz"])
    x = [_number("f32", value, flush) for value in a]
    return _bits("f32", f"{m['op']}_{m['how']}({', '.join(x)})", flush)


def _c(template: str) -> Callable[[re.Match[str], list[str]], str]:
    """A template with operands {0}, {1} and so on, {T} for the type and {U} for it without a sign."""

    def expression(m: re.Match[str], a: list[str]) -> str:
        kind = m.groupdict().get("T") or ""
        names = {"T": kind, "U": "u" + kind[1:], "W": f"{kind[0]}{2 * width(kind)}" if kind[1:].isdigit() else ""}
        return template.format(*(f"({value})" for value in a), **names)

    return expression


_ARITHMETIC = rf"(?P<op>add|sub|mul|fma)(?:\.rn)?(?P<ftz>\.ftz)?\.{FLOAT}"

#: (name, numbers of operands besides the result, the expression)
RULES: list[tuple[str, tuple[int, ...], Callable[[re.Match[str], list[str]], str]]] = [
    (_ARITHMETIC.replace("|fma", ""), (2,), _arithmetic),
    (_ARITHMETIC.replace("add|sub|mul|", ""), (3,), _arithmetic),
    (r"(?P<op>add|sub)(?:\.rn)?\.f32\.(?P<T>f16|bf16)", (2,), _mixed),
    (rf"(?P<op>add|sub|mul)(?:\.rn)?\.{PAIR}", (2,), _pair),
    (rf"(?P<op>fma)\.rn\.{PAIR}", (3,), _pair),
    (rf"(?P<op>max|min)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.{FLOAT}", (2, 3), _extreme),
    (r"setp\.(?P<test>\w+)(?P<ftz>\.ftz)?\.(?P<T>[sub](?:16|32|64)|f32|f64|f16|bf16)", (2,), _compare),
    (
        r"cvt(?:\.(?P<round>r\w+))?(?P<ftz>\.ftz)?\.(?P<D>[sub]\d+|f32|f64|f16|bf16)\.(?P<S>[sub]\d+|f32|f64|f16|bf16)",
        (1,),
        _convert,
    ),
    (r"cvt\.rn\.(?P<D>f16|bf16)x2\.f32", (2,), _convert_pair),
    (r"(?P<op>ex2|lg2|rcp|sqrt|rsqrt|tanh)\.(?P<how>approx)(?P<ftz>\.ftz)?\.f32", (1,), _approximate),
    (r"(?P<op>div)\.(?P<how>full|approx)(?P<ftz>\.ftz)?\.f32", (2,), _approximate),
    (r"rcp\.approx\.ftz\.f64", (1,), _c("to_f64(rcp_approx_f64(from_f64({0})))")),
    (r"rcp\.rn\.(?P<T>f32|f64)", (1,), _c("to_{T}(1 / from_{T}({0}))")),
    (r"div\.rn\.(?P<T>f32|f64)", (2,), _c("to_{T}(from_{T}({0}) / from_{T}({1}))")),
    (r"sqrt\.rn\.f32", (1,), _c("to_f32(sqrtf(from_f32({0})))")),
    (r"sqrt\.rn\.f64", (1,), _c("to_f64(sqrt(from_f64({0})))")),
    (r"abs\.ftz\.f32", (1,), _c("to_f32(ftz(fabsf(from_f32({0}))))")),
    (r"abs\.(?P<T>f32|f64|f16|bf16)", (1,), lambda m, a: f"({a[0]}) & ~(1ull << {width(m['T']) - 1})"),
    (r"neg\.(?P<T>f32|f64|f16|bf16)", (1,), lambda m, a: f"({a[0]}) ^ (1ull << {width(m['T']) - 1})"),
    (rf"add\.{INTEGER}", (2,), _c("({T})(({U}){0} + ({U}){1})")),
    (rf"sub\.{INTEGER}", (2,), _c("({T})(({U}){0} - ({U}){1})")),
    (rf"mul\.lo\.{INTEGER}", (2,), _c("({U})(({U}){0} * (u64)({U}){1})")),
    (r"mul\.wide\.(?P<T>[su](?:16|32))", (2,), _c("({W})({T}){0} * ({W})({T}){1}")),
    (r"mul\.hi\.(?P<T>[su]32)", (2,), _c("({U})((({W})({T}){0} * ({W})({T}){1}) >> 32)")),
    (r"mul\.hi\.(?P<T>s)64", (2,), lambda m, a: f"(u64)(((__int128)(s64)({a[0]}) * (s64)({a[1]})) >> 64)"),
    (r"mul\.hi\.(?P<T>u)64", (2,), lambda m, a: f"(u64)(((unsigned __int128)({a[0]}) * (u64)({a[1]})) >> 64)"),
    (rf"mad\.lo\.{INTEGER}", (3,), _c("({U})(({U}){0} * (u64)({U}){1} + ({U}){2})")),
    (r"mad\.wide\.(?P<T>[su](?:16|32))", (3,), _c("(u64)(({W})({T}){0} * ({W})({T}){1}) + (u64){2}")),
    (r"(?P<op>div|rem)\.(?P<T>[su](?:16|32|64))", (2,), lambda m, a: f"{m['op']}_{m['T']}({a[0]}, {a[1]})"),
    (r"min\.(?P<T>[su](?:16|32|64))", (2,), _c("({T}){0} < ({T}){1} ? ({T}){0} : ({T}){1}")),
    (r"max\.(?P<T>[su](?:16|32|64))", (2,), _c("({T}){0} > ({T}){1} ? ({T}){0} : ({T}){1}")),
    (r"neg\.(?P<T>s(?:16|32|64))", (1,), _c("-({U}){0}")),
    (r"abs\.(?P<T>s(?:16|32|64))", (1,), _c("({T}){0} < 0 ? -({U}){0} : ({U}){0}")),
    (r"and\.(?P<T>b16|b32|b64|pred)", (2,), _c("({T}){0} & ({T}){1}")),
    (r"or\.(?P<T>b16|b32|b64|pred)", (2,), _c("({T}){0} | ({T}){1}")),
    (r"xor\.(?P<T>b16|b32|b64|pred)", (2,), _c("({T}){0} ^ ({T}){1}")),
    (r"not\.(?P<T>b16|b32|b64)", (1,), _c("~({T}){0}")),
    (r"not\.pred", (1,), _c("!{0}")),
    (r"shl\.b(16|32|64)", (2,), lambda m, a: f"shl_b{m[1]}({a[0]}, {a[1]})"),
    (r"shr\.[ub](16|32|64)", (2,), lambda m, a: f"shr_u{m[1]}({a[0]}, {a[1]})"),
    (r"shr\.s(16|32|64)", (2,), lambda m, a: f"shr_s{m[1]}({a[0]}, {a[1]})"),
    (r"selp\.(?P<T>[subf](?:16|32|64))", (3,), _c("{2} ? {0} : {1}")),
    (r"bfe\.([us]32)", (3,), lambda m, a: f"bfe_{m[1]}({', '.join(a)})"),
    (r"(bfi\.b32)", (4,), lambda m, a: f"bfi_b32({', '.join(a)})"),
    (r"(prmt\.b32)", (3,), lambda m, a: f"prmt_b32({', '.join(a)})"),
    (r"(lop3\.b32)", (4,), lambda m, a: f"lop3_b32({', '.join(a)})"),
    (r"popc\.b32", (1,), _c("__builtin_popcount((u32){0})")),
    (r"mov\.(?:pred|[subf](?:16|32|64))", (1,), _c("{0}")),
    (r"cvta(?:\.to)?\.(?:global|shared|const)\.u64", (1,), _c("{0}")),
]
_COMPILED = [(re.compile(pattern), counts, rule) for pattern, counts, rule in RULES]


def expression(instruction: Instruction, operands: list[str]) -> str:
    """The value of an instruction's result; operands are expressions of C."""
    for pattern, counts, rule in _COMPILED:
        match = pattern.fullmatch(instruction.name)
        if match and len(operands) in counts:
            return rule(match, operands)
    raise NotUnderstood(f"unknown instruction, or one with another number of operands: {instruction}")
