"""A flame graph of a profile by py-spy, small enough for the documentation: `python -m benchmarks.flame RAW SVG`.

    py-spy record -F -f raw -o RAW -- python launch.py --config configs/csd-edit-scene.yaml ...

Width is time; a frame stands on the one that called it. Frames that only pass calls on are left out, and what is
thinner than a thousandth of the whole, or deeper than 30 frames.
"""

import argparse
import re
import zlib
from collections import Counter
from html import escape
from pathlib import Path

WIDTH, ROW, LETTER = 1200, 17, 6.6  # pixels; of the picture, a frame's height, a letter's width
LEAST, MOST = 1e-3, 30  # share of the whole, frames of a stack
PLUMBING = re.compile(
    r"^(thread|<module>|main|run|start|work|.*_call_impl|decorate_context|.*wrapper|.*\.apply|advance|run_steps"
    r"|.*<listcomp>|.*(_find_and_load|_load_unlocked|exec_module|_call_with_frames|_handle_fromlist)|_predict|_network"
    r"|call_forward|once_differentiable|.*decorate_context|.*\.advance|run_phases|Prior\..*|predict_queries) "
)


def read(path: Path) -> Counter[tuple[str, ...]]:
    """Samples by stack, outermost frame first; a frame is `name (file)`."""
    found: Counter[tuple[str, ...]] = Counter()
    for line in path.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        frames = [frame for frame in stack.split(";") if not PLUMBING.match(frame)][:MOST]
        short = (re.sub(r"\((?:.*/)?([^/:]+?)(?:\.py)?(?::\d+)?\)$", r"(\1)", frame) for frame in frames)
        found[tuple(short)] += int(count)
    return found


def boxes(stacks: Counter[tuple[str, ...]], depth: int = 0, x: int = 0) -> list[tuple[int, int, int, str]]:
    """(depth, first sample, samples, frame) of every frame wide enough."""
    least = LEAST * sum(stacks.values()) if depth == 0 else 0
    found = []
    for frame in sorted({stack[depth] for stack in stacks if len(stack) > depth}):
        inner = Counter({stack: n for stack, n in stacks.items() if len(stack) > depth and stack[depth] == frame})
        count = sum(inner.values())
        found += [(depth, x, count, frame), *boxes(inner, depth + 1, x)]
        x += count
    return [box for box in found if box[2] >= least]


def draw(stacks: Counter[tuple[str, ...]]) -> str:
    """The SVG, without script."""
    total = sum(stacks.values())
    found = boxes(stacks)
    height = (max(depth for depth, *_ in found) + 1) * ROW + 4
    body = []
    for depth, x, count, frame in found:
        left, width, top = WIDTH * x / total, WIDTH * count / total, height - (depth + 1) * ROW
        colour = f"hsl({zlib.crc32(frame.encode()) % 45 + 10},75%,68%)"
        body.append(
            f'<g><title>{escape(frame)}: {count / total:.1%}</title><rect x="{left:.1f}" y="{top}" '
            f'width="{max(width - 0.4, 0.3):.1f}" height="{ROW - 1}" fill="{colour}"/>'
        )
        room = int((width - 6) / LETTER)
        if room > 3:
            text = frame if len(frame) <= room else f"{frame[: room - 1]}…"
            body.append(f'<text x="{left + 3:.1f}" y="{top + 12}">{escape(text)}</text>')
        body.append("</g>")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"><style>text{{font:11px monospace}}'
    return f'{head}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raw", type=Path)
    parser.add_argument("svg", type=Path)
    options = parser.parse_args()
    options.svg.write_text(draw(read(options.raw)))


if __name__ == "__main__":
    main()
