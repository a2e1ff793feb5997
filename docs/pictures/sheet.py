"""Makes sheet.png: what the demo's model draws for nine captions, by a daemon of its own with two CPU ranks.

.venv/bin/python docs/pictures/sheet.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CAPTIONS = (
    "a red circle left of a blue square",
    "a large pink heart",
    "three small yellow stars on a blue background",
    "a green triangle above an orange square",
    "two purple diamonds on a yellow background",
    "a small white circle in the top left corner on a black background",
    "a black square right of a red heart on a pink background",
    "a large orange diamond on a white background",
    "a blue circle and a green square",
)
ACROSS = 3
SIDE, TEXT, GAP = 256, 40, 12


def main() -> None:
    rows = -(-len(CAPTIONS) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (SIDE + GAP) + GAP, rows * (SIDE + TEXT + GAP) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    with tempfile.TemporaryDirectory() as folder:
        for i, caption in enumerate(CAPTIONS):
            picture = Path(folder) / f"{i}.png"
            demo = [sys.executable, "-m", "xditd.cli.xditctl", "demo", caption, "-o", str(picture)]
            subprocess.run(demo, check=True, stdout=subprocess.DEVNULL)
            x, y = GAP + i % ACROSS * (SIDE + GAP), GAP + i // ACROSS * (SIDE + TEXT + GAP)
            sheet.paste(Image.open(picture), (x, y))
            pen.multiline_text((x, y + SIDE + 4), textwrap.fill(caption, 40), fill="black", font=font)
    path = Path(__file__).with_name("sheet.png")
    sheet.save(path)
    print(path)


if __name__ == "__main__":
    main()
