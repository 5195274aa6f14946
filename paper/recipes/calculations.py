"""Draw random calculations of the kinds that word problems have, and work them place by place.

    24*36: 24*30=720, 24*6=144, 720+100=820, 820+40=860, 860+4=864
    600/8: 560/8=70, 600-560=40, 40/8=5, 70+5=75
    2/3*(57+3): 57+3=60, 2*60=120, 120/3=40

A step such as 820+40=860 is small enough for one forward pass of a small model; 24*36 is not. Every
step is right, because numbers are decimals and all arithmetic is exact. `draw` passes over
calculations that nobody would write out, such as 100/3, and over negative results.
"""

import ast
import decimal
import operator
from collections import namedtuple
from decimal import Decimal

LONGEST = 110  # characters of a thought
EXACT = decimal.Context(prec=5, traps=[decimal.Inexact])
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": EXACT.divide}

Calculation = namedtuple("Calculation", "expression steps result thought")

# How many calculations of a thousand have which form, after GSM8K's annotations. `numbers` draws
# the letters.
FORMS = {
    "{n}*{s}": 165, "{s}*{o}": 165, "{o}-{n}": 170, "{n}+{o}": 160, "{m}/{s}": 130, "{s}/{t}": 20,
    "{n}+{o}+{s}": 45, "{n}+{s}+{o}+{t}": 15, "{o}-{s}-{n}": 15, "{n}*{d}": 35, "{d}*{o}": 10,
    "{p}/100*{n}": 25, "{n}*{p}/100": 10, "{t}/{s}*{m}": 20,
    "{s}*{t}*{s}": 10, "{s}*{t}+{n}": 10, "{n}+{d}": 10, "({n}+{o})/{t}": 5}


# ------------------------------------------------------------------------------------ on paper


def show(x):
    """Spell a number without needless zeros."""
    return f"{x.normalize():f}"


def places(x):
    """Split 305.2 into 300, 5 and 0.2."""
    digits = enumerate(x.as_tuple().digits)
    return [Decimal(digit).scaleb(x.adjusted() - n) for n, digit in digits if digit]


def write(steps, a, sign, b):
    """Append a step such as 120-40=80; return its result."""
    result = APPLY[sign](a, b)
    steps.append(f"{show(a)}{sign}{show(b)}={show(result)}")
    return result


def add(steps, a, b, sign="+"):
    """Add (or subtract) the places of b one after the other, the largest first."""
    for place in places(b):
        a = write(steps, a, sign, place)
    return a


def subtract(steps, a, b):
    return add(steps, a, b, "-")


def multiply(steps, a, b):
    """Multiply by the places of the longer number, and add up. A number of one place times a number
    of at most two is one step."""
    short, long = sorted((a, b), key=lambda x: len(places(x)))
    if len(places(short)) == 1 and len(places(long)) < 3:
        return write(steps, a, "*", b)
    total, *parts = [multiply(steps, short, place) for place in places(long)]
    for part in parts:
        total = add(steps, total, part)
    return total


def divide(steps, a, b):
    """Divide part after part, and add up. The first part is an estimate of the whole: 2604/7 begins
    with 2100/7=300."""
    if b in (1, 10, 100, 1000):
        return write(steps, a, "/", b)
    rest, total = a, 0
    for place in places(EXACT.divide(a, b)):
        part = place * b
        write(steps, part, "/", b)
        if part < rest:
            rest = write(steps, rest, "-", part)
        total = write(steps, total, "+", place) if total else place
    return total


WORK = {ast.Add: add, ast.Sub: subtract, ast.Mult: multiply, ast.Div: divide}


def work(expression):
    """Return the steps and the value of an expression of numbers, + - * / and brackets.

    A fraction of a number is multiplied first: 2/3*60 is 2*60/3.
    """
    steps = []

    def value(node):
        match node:
            case ast.Constant(number):
                return Decimal(str(number))
            case ast.BinOp(ast.BinOp(x, ast.Div(), y), ast.Mult(), z):
                return divide(steps, multiply(steps, value(x), value(z)), value(y))
            case ast.BinOp(x, sign, y):
                return WORK[type(sign)](steps, value(x), value(y))

    return steps, value(ast.parse(expression, mode="eval").body)


# ---------------------------------------------------------------------------- random calculations


def numbers(random):
    """Draw a number for each letter of FORMS; m is a multiple of s."""
    def below(*limits):
        return random.randrange(2, random.choice(limits))

    s, part = below(10, 10, 13, 61), random.choice((5, 25, 75, below(10)))
    return {"s": s, "t": below(10, 13, 61), "m": s * below(10, 100, 300),
            "n": below(10, 100, 100, 1000), "o": below(10, 100, 1000) * random.choice((1, 1, 10)),
            "p": 5 * below(20), "d": f"{random.choice(('', 0, below(13)))}.{part}"}


def draw(random, avoid=()):
    """Draw a Calculation whose expression is not one of `avoid`."""
    while True:
        (form,) = random.choices(list(FORMS), FORMS.values())
        expression = form.format(**numbers(random))
        try:
            steps, value = work(expression)
        except decimal.Inexact:
            continue
        thought = f"{expression}: {', '.join(steps)}"
        if value > 0 and len(thought) <= LONGEST and expression not in avoid:
            return Calculation(expression, steps, show(value), thought)
