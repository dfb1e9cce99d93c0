"""Write the built-in Polish text anew: the rows of `--data mis`, which ship in
mis_mlx/data/polish/mis.

    scripts/mis benchmarks/mis_texts.py

Seconds. The files come out as they are in the checkout, to the byte, unless polish_text/ was
changed.
"""

from __future__ import annotations

from polish_text import documents

from mis_mlx.data import preparation

if __name__ == "__main__":
    documents.write(preparation.MIS_FOLDER)
