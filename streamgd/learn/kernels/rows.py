"""Passes over the rows of a batch: predictions, gradients, changes of predictions, moments.

Rows lie one behind the other, d numbers each, in float32 or float64. They are taken four at a time, or sixteen (eight
in float64) when there are several outputs; the order of every sum follows from the row, the batch and the number of
features alone. A row's features are covered by blocks of one width, the widest that fits; the last block ends where the
row ends and so overlaps the one before, where its coefficients are zero, or its sums are left out.

Rows come from memory at one speed and are computed at another; both go on at once only if lines are asked for long
before they are needed, at an even pace through all passes. `Ahead` is that pace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from streamgd.learn.kernels.llvm import F32, F64, Code, Pointer, Value, Variable, function, joined, smaller, where

#: Bytes of a cache line, and of the widest block. Wider ones would cross a line at almost every row, and their sums
#: would take longer to fold.
LINE, BLOCK = 64, 32


def size(element: object) -> int:
    """Return the bytes of a number."""
    return 4 if element == F32 else 8


def line_lanes(element: object) -> int:
    """Return how many numbers fill a line."""
    return LINE // size(element)


def block_lanes(element: object) -> tuple[int, ...]:
    """Return the widths of blocks, widest first, of dot products."""
    return (8, 4, 1) if element == F32 else (4, 1)


def column_lanes(element: object) -> tuple[int, ...]:
    """Return the widths of blocks, widest first, where columns are summed."""
    return line_lanes(element), 4, 1


def per_width(code: Code, widths: tuple[int, ...], d: Value, write: Callable[[int], None]) -> None:
    """Write something for each width of blocks, of which the one for d features will be done."""
    for lanes, wider in zip(widths, (None, *widths), strict=False):
        fits = d >= lanes if wider is None else (d >= lanes) & (d < wider)
        with code.when(fits):
            write(lanes)


def padded(d: Value, lanes: int) -> Value:
    """Return d rounded up to whole blocks."""
    return (d + (lanes - 1)) & -lanes


def padded_row(d: Value, widths: tuple[int, ...]) -> Value:
    """Return d rounded up to whole blocks of the width that fits."""
    row = d
    for lanes in reversed(widths):
        row = where(d >= lanes, padded(d, lanes), row)
    return row


@dataclass
class Ahead:
    """Lines to ask for while something else is computed.

    Attributes
    ----------
    base : Pointer
        Where they begin.
    offset : Variable
        Bytes asked for so far.
    stride : Value
        Bytes to go on by at each step.
    """

    base: Pointer
    offset: Variable[Value]
    stride: Value

    @classmethod
    def of(cls, base: Pointer, share: Value, lanes: int) -> Ahead:
        """Begin at an address; ask for so many quarters of what a step reads, lanes numbers of each of four rows."""
        stride = share * (lanes * size(base.element))
        return cls(base, base.code.variable(base.code.integer(0)), stride)

    def step(self) -> None:
        """Ask for the next line, or two lines."""
        offset = self.offset.value
        self.base.prefetch(offset)
        self.base.prefetch(offset + (self.stride >> 1))
        self.offset.value = offset + self.stride


Rows = list[Pointer]


def by_four(code: Code, x: Pointer, n: Value, d: Value, body: Callable[[Value, Rows], None]) -> None:
    """Do body(i, rows) for four rows at a time; among the last four, the last row stands in for those beyond it."""
    whole, first = n & -4, code.variable(x)
    twice, thrice = d * 2, d * 3
    with code.loop(0, whole, 4) as i:
        row = first.value
        body(i, [row, row + d, row + twice, row + thrice])
        first.add(d * 4)
    with code.when(whole < n):
        body(whole, [x + smaller(whole + later, n - 1) * d for later in range(4)])


@dataclass
class Coefficients:
    """The coefficients of a row as blocks: a few of them at hand, or else loaded as they are needed.

    Attributes
    ----------
    w : Pointer
        The blocks.
    d : Value
        Features.
    lanes : int
        Features of a block.
    n_blocks : int, optional
        How many blocks there are, if that is known when the code is written.
    """

    w: Pointer
    d: Value
    lanes: int
    n_blocks: int | None

    def __post_init__(self) -> None:
        """Load what all rows share."""
        self._held = [self.w.load(b * self.lanes, self.lanes) for b in range(self.n_blocks or 1)]

    def dots(self, code: Code, rows: Rows, ahead: Ahead) -> Value:
        """Return the dot products of four rows as a vector: each sums its blocks, whose lanes are added in halves."""
        sums = [code.variable(row.load(0, self.lanes) * self._held[0]) for row in rows]

        def add(offset: Value, block: Value) -> None:
            for total, row in zip(sums, rows, strict=True):
                total.add(row.load(offset, self.lanes) * block)

        ahead.step()
        last = self.d - self.lanes
        if self.n_blocks is None:
            whole, pair = padded(self.d, self.lanes), 2 * self.lanes
            with code.loop(self.lanes, whole - self.lanes, pair) as j:
                add(j, self.w.load(j, self.lanes))
                add(smaller(j + self.lanes, last), self.w.load(j + self.lanes, self.lanes))
                ahead.step()
            with code.when((whole & self.lanes) == 0):
                add(last, self.w.load(whole - self.lanes, self.lanes))
        for b, block in enumerate(self._held[1:], 1):
            add(last if b + 1 == len(self._held) else code.integer(b * self.lanes), block)
            if b % 2 == 0:
                ahead.step()
        return _folded([total.value for total in sums], self.lanes)


def _folded(totals: list[Value], lanes: int) -> Value:
    """Return four vectors' sums as one vector: halves are added, and share vectors that CPUs shuffle cheaply."""
    if lanes == 1:
        return joined(totals)
    a, b, c, d = totals
    if lanes == 8:
        ac, bd = (one.pick(_UPPER_LOWER[0], two) + one.pick(_UPPER_LOWER[1], two) for one, two in ((a, c), (b, d)))
        pairs = ac.pick([0, 1, 8, 9, 4, 5, 12, 13], bd) + ac.pick([2, 3, 10, 11, 6, 7, 14, 15], bd)
        return pairs.pick([0, 2, 4, 6]) + pairs.pick([1, 3, 5, 7])
    if totals[0].element == F32:
        ab, cd = (one.pick([0, 1, 4, 5], two) + one.pick([2, 3, 6, 7], two) for one, two in ((a, b), (c, d)))
        return ab.pick([0, 2, 4, 6], cd) + ab.pick([1, 3, 5, 7], cd)
    ac, bd = (one.pick([0, 1, 4, 5], two) + one.pick([2, 3, 6, 7], two) for one, two in ((a, c), (b, d)))
    return ac.pick([0, 4, 2, 6], bd) + ac.pick([1, 5, 3, 7], bd)


_UPPER_LOWER = ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])


def per_blocks(code: Code, element: object, d: Value, w: Pointer, write: Callable[[Coefficients], None]) -> None:
    """Write something for each width of blocks, and for rows of two of the widest blocks, of which one will be done."""

    def choose(lanes: int) -> None:
        with code.either(d > 4 * lanes) as (then, otherwise):
            with then:
                write(Coefficients(w, d, lanes, None))
            with otherwise, code.either(d > 3 * lanes) as (then, otherwise):
                with then:
                    write(Coefficients(w, d, lanes, 4))
                with otherwise:
                    write(Coefficients(w, d, lanes, None))

    per_width(code, block_lanes(element), d, choose)


@function
def convert(code: Code, source: Pointer, n: Value, target: Pointer) -> None:
    """Write n doubles in another type."""
    code.each(n, lambda j, lanes: target.store(j, source.load(j, lanes).to(target.element)))


@function
def spread(code: Code, source: Pointer, d: Value, w: Pointer) -> None:
    """Write d coefficients to w in the rows' type, as the blocks of a row take them."""
    convert(code, source, d, w)

    def last_block(lanes: int) -> None:
        if lanes > 1:
            n = padded(d, lanes)
            doubled = code.lane_numbers(lanes) < n - d
            w.store(n - lanes, where(doubled, 0.0, source.load(d - lanes, lanes).to(w.element)))

    per_width(code, block_lanes(w.element), d, last_block)


@function
def predict(
    code: Code, x: Pointer, n: Value, d: Value, w: Pointer, plus: Value, out: Pointer, base: Pointer, share: Value
) -> None:
    """Write plus + the dot product with w of each of n rows; up to three more places are written to."""

    def write(coefficients: Coefficients) -> None:
        ahead = Ahead.of(base, share, 2 * coefficients.lanes)

        def predict_four(i: Value, four: Rows) -> None:
            out.store(i, coefficients.dots(code, four, ahead).to(F64) + plus)

        by_four(code, x, n, d, predict_four)

    per_blocks(code, x.element, d, w, write)


@function
def bend_along(
    code: Code,
    x: Pointer,
    n: Value,
    d: Value,
    w: Pointer,
    plus: Value,
    curves: Pointer,
    total: Pointer,
    base: Pointer,
    share: Value,
) -> None:
    """Add to four sums, by the number of the row: curves[i] times the square of plus + the dot product of row i and w.

    The curves of up to three rows beyond the last are zero.
    """

    def write(coefficients: Coefficients) -> None:
        ahead = Ahead.of(base, share, 2 * coefficients.lanes)
        sums = code.variable(total.load(0, 4))

        def bend_four(i: Value, four: Rows) -> None:
            change = coefficients.dots(code, four, ahead).to(F64) + plus
            sums.add(curves.load(i, 4) * change * change)

        by_four(code, x, n, d, bend_four)
        total.store(0, sums.value)

    per_blocks(code, x.element, d, w, write)


@function
def add_gradient(
    code: Code, x: Pointer, n: Value, d: Value, slopes: Pointer, g: Pointer, base: Pointer, share: Value
) -> None:
    """Add the sum of slopes[i] * row i over n rows to g, which lies in blocks, four rows at a time.

    The slopes of up to three rows beyond the last are zero.
    """

    def blocks(first: Value, lanes: int, n_blocks: int, ahead: Ahead) -> None:
        starts = [first + b * lanes for b in range(n_blocks)]
        offsets = [smaller(start, d - lanes) for start in starts]
        sums = [code.variable(g.load(start, lanes)) for start in starts]

        def add_four(i: Value, four: Rows) -> None:
            factors = [code.splat(slopes[i + later], lanes) for later in range(4)]
            for total, offset in zip(sums, offsets, strict=True):
                p, q, r, t = (row.load(offset, lanes) * factor for row, factor in zip(four, factors, strict=True))
                total.add((p + q) + (r + t))
                ahead.step()

        by_four(code, x, n, d, add_four)
        for start, total in zip(starts, sums, strict=True):
            g.store(start, total.value)

    def write(lanes: int) -> None:
        ahead = Ahead.of(base, share, lanes)
        n_lanes, done = padded(d, lanes), code.integer(0)
        for n_blocks in (2, 1):
            whole = n_lanes & (-n_blocks * lanes)
            with code.loop(done, whole, n_blocks * lanes) as j:
                blocks(j, lanes, n_blocks, ahead)
            done = whole

    per_width(code, column_lanes(x.element), d, write)


@function
def gather_blocks(code: Code, g: Pointer, d: Value, out: Pointer) -> None:
    """Write what lies in blocks to out, in the order of the features, as doubles."""

    def write(lanes: int) -> None:
        n_lanes = padded(d, lanes)
        with code.loop(0, n_lanes, lanes) as j:
            out.store(smaller(j, d - lanes), g.load(j, lanes).to(F64))

    per_width(code, column_lanes(g.element), d, write)


@function
def add_tile_moments(code: Code, x: Pointer, n: Value, d: Value, sums: Pointer, squares: Pointer) -> None:
    """Add n rows and their squares to sums, the rows' own sums in their own type, four rows at a time."""

    def write(lanes: int) -> None:
        n_lanes, whole = padded(d, lanes), n & -4
        with code.loop(0, n_lanes, lanes) as j:
            offset = smaller(j, d - lanes)
            one, two = (code.variable(code.zeros(x.element, lanes)) for _ in range(2))
            with code.loop(0, whole, 4) as i:
                a, b, c, e = ((x + (i + later) * d).load(offset, lanes) for later in range(4))
                one.add((a + b) + (c + e))
                two.add((a * a + b * b) + (c * c + e * e))
            with code.loop(whole, n) as i:
                a = (x + i * d).load(offset, lanes)
                one.add(a)
                two.add(a * a)
            for total, place in ((one.value, sums), (two.value, squares)):
                added = total.to(F64)
                if lanes > 1:  # features that the block before has had already
                    added = where(code.lane_numbers(lanes) < j - offset, 0.0, added)
                place.store(offset, place.load(offset, lanes) + added)

    per_width(code, column_lanes(x.element), d, write)


# --- several outputs -------------------------------------------------------------------------------------------------
#: Products of so many features are summed in the rows' type before they go into a double.
CHUNK = 128


def _four(pointer: Pointer, k: Value, n_outputs: Value, stride: Value) -> list[Pointer]:
    """Return where four outputs' numbers begin, from output k on; the last output stands in for those beyond it."""
    return [pointer + smaller(k + later, n_outputs - 1) * stride for later in range(4)]


@function
def turn(code: Code, x: Pointer, n: Value, d: Value, turned: Pointer) -> None:
    """Write a line's worth of rows, n of them there, feature by feature; rows beyond the last are zeros."""
    lanes = line_lanes(x.element)
    fits = (n == lanes) & (d >= 4)
    with code.either(fits) as (then, otherwise):
        with then, code.loop(0, padded(d, 4), 4) as j:
            start = smaller(j, d - 4)
            loads = [(x + d * i).load(start, 4) for i in range(lanes)]
            for f, column in enumerate(_columns(loads)):
                turned.store((start + f) * lanes, column)
        with otherwise, code.loop(0, d) as j:
            turned.store(j * lanes, code.zeros(x.element, lanes))
            with code.loop(0, smaller(n, lanes)) as i:
                turned[j * lanes + i] = x[i * d + j]


def _columns(rows: list[Value]) -> list[Value]:
    """Return the four columns of rows of four."""
    fours = [joined(rows[i : i + 4]) for i in range(0, len(rows), 4)]
    columns = [[four.pick(range(f, 16, 4)) for four in fours] for f in range(4)]
    return [joined(parts) for parts in columns]


@function
def predict_outputs(
    code: Code,
    turned: Pointer,
    d: Value,
    w: Pointer,
    plus: Pointer,
    step: Value,
    n_outputs: Value,
    out: Pointer,
    stride: Value,
) -> None:
    """Write plus[k * step] + the dot product with w[k] of each turned row to out[k * stride + row].

    Features are summed in their order, in the rows' type for CHUNK of them at a time and in doubles beyond.
    """
    lanes = line_lanes(turned.element)
    with code.loop(0, n_outputs, 4) as k:
        coefficients, results = _four(w, k, n_outputs, d), _four(out, k, n_outputs, stride)
        intercepts = _four(plus, k, n_outputs, step)
        totals = [code.variable(code.splat(intercept[0], lanes)) for intercept in intercepts]
        with code.loop(0, d, CHUNK) as first:
            sums = [code.variable(code.zeros(turned.element, lanes)) for _ in range(4)]
            with code.loop(first, smaller(first + CHUNK, d)) as j:
                column = turned.load(j * lanes, lanes)
                for total, coefficient in zip(sums, coefficients, strict=True):
                    total.add(column * coefficient[j])
            for total, part in zip(totals, sums, strict=True):
                total.add(part.value.to(F64))
        for total, result in zip(totals, results, strict=True):
            result.store(0, total.value)


@function
def add_gradients(
    code: Code,
    x: Pointer,
    n: Value,
    d: Value,
    slopes: Pointer,
    stride: Value,
    n_outputs: Value,
    g: Pointer,
    width: Value,
) -> None:
    """Do what `add_gradient` does for several outputs: slopes[k * stride + i], g[k * width + j]."""

    def write(lanes: int) -> None:
        with code.loop(0, n_outputs, 4) as k:
            factors, results = _four(slopes, k, n_outputs, stride), _four(g, k, n_outputs, width)
            with code.loop(0, padded(d, lanes), lanes) as j:
                offset = smaller(j, d - lanes)
                sums = [code.variable(result.load(j, lanes)) for result in results]

                def add_four(i: Value, four: Rows) -> None:
                    blocks = [row.load(offset, lanes) for row in four]
                    for total, factor in zip(sums, factors, strict=True):
                        a, b, c, e = (block * factor[i + later] for later, block in enumerate(blocks))
                        total.add((a + b) + (c + e))

                by_four(code, x, n, d, add_four)
                for result, total in zip(results, sums, strict=True):
                    result.store(j, total.value)

    per_width(code, column_lanes(x.element), d, write)
