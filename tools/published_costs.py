"""What papers and repositories say that codecs cost, beside which tools/complexity.py puts ours.

Facts with their sources, as stated: sizes of pictures, conventions of MACs and graphics cards
differ from row to row, and are given where the source names them.  "Counted" is not stated by the
source but was counted from its released code, at 768x512.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One codec.

    Attributes:
        params: in millions.
        macs: multiply-accumulates, of encoder and decoder together.
        times: of the codec on some GPU; empty where nothing is stated.
        source: paper or GitHub repository.
    """

    name: str
    params: str
    macs: str
    times: str
    source: str


PUBLISHED_CODECS = (
    Published(
        "CMamba",
        "56.26, derived",
        "362.7 G at 768x512, derived",
        "decoding 71.4 % shorter than MLIC++'s",
        "arXiv 2502.04988, which states 51.8 % and 28.1 % less than MLIC++",
    ),
    Published(
        "MLIC++",
        "116.72, counted",
        "504.4 G, counted",
        "decoding 226, 268 and 410 ms, by source",
        "JiangWeibeta/MLIC",
    ),
    Published(
        "MambaVC",
        "47.88 stated, 53.30 counted",
        "1032 k per pixel, counted without the scan",
        "",
        "QinSY123/2024-MambaVC",
    ),
    Published(
        "MambaIC",
        "123.81, counted",
        "1570 k per pixel, counted",
        "decoding 0.669 s at 2K",
        "AuroraZengfh/MambaIC",
    ),
    Published("CMIC", "69.11", "2.39 T at 2K", "decoding 0.405 s at 2K", "UnoC-727/CMIC"),
    Published(
        "LALIC",
        "63.24",
        "286.2 G",
        "encoding 274 ms, decoding 150 ms on an RTX 4090",
        "sjtu-medialab/RwkvCompress",
    ),
    Published(
        "DCAE",
        "119.2",
        "963 k per pixel, counted",
        "encoding 93 ms, decoding 100 ms",
        "LabShuHangGU/DCAE",
    ),
    Published("HPCM-Base", "68.50", "919 k per pixel", "decoding 81 ms", "lyq133/LIC-HPCM"),
    Published("HPCM-Large", "89.71", "1261 k per pixel", "decoding 90 ms", "lyq133/LIC-HPCM"),
    Published(
        "TCM, large",
        "75.9 stated, 76.57 counted",
        "1846 k per pixel, counted",
        "decoding 151 and 202 ms, by source",
        "jmliu206/LIC_TCM",
    ),
    Published(
        "FTIC", "69.8 to 71.0", "1096 k per pixel", "decoding over 1 s", "qingshi9974/ICLR2024-FTIC"
    ),
)
