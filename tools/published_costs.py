"""What papers and repositories say that codecs cost and gain, beside which ours are put.

Facts with their sources, as stated: sizes of images, conventions of MACs and graphics cards
differ from row to row, and are given where the source names them.  "Counted" is not stated by the
source but was counted from its released code, at 768x512.  BD-rates are those on Kodak by PSNR,
with the version of VTM that is their anchor: versions differ by up to two per cents.

tools/complexity.py shows them; the table in docs/benchmarks.md is kept by hand, and a test
compares it.
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
        bd_rate: as stated, in per cent, and its anchor.
        curve: the codec's points in benchmarks/published_kodak.json, by their name; empty where
            there are none.
    """

    name: str
    params: str
    macs: str
    times: str
    source: str
    bd_rate: str
    curve: str = ""


PUBLISHED_CODECS = (
    Published("CMamba", "56.26, derived", "362.7 G at 768x512, derived; convention unknown",
              "decoding 71.4 % shorter than MLIC++'s, GPU not recorded here",
              "arXiv 2502.04988, which states 51.8 % and 28.1 % less than MLIC++",
              "−14.95, VTM-17.0 by inference"),
    Published("MLIC++", "116.72, counted", "504.4 G, counted; no scan",
              "decoding 226, 268 and 410 ms, by source and GPU", "JiangWeibeta/MLIC",
              "−13.39, VTM-17", "MLIC++"),
    Published("MambaVC", "47.88 stated, 53.30 counted",
              "1032 k per pixel, counted without the scan", "", "QinSY123/2024-MambaVC",
              "−8.10, VTM-21; −8.72, VTM-22"),
    Published("MambaIC", "123.81, counted",
              "1570 k per pixel, counted; convention not recorded here",
              "decoding 0.669 s at 2K, GPU not recorded here", "AuroraZengfh/MambaIC",
              "−13.01, VTM-21"),
    Published("CMIC", "69.11", "2.39 T at 2K; convention not recorded here",
              "decoding 0.405 s at 2K, GPU not recorded here", "UnoC-727/CMIC", "−15.91, VTM-21"),
    Published("LALIC", "63.24", "286.2 G; size and convention not recorded here",
              "encoding 274 ms, decoding 150 ms on an RTX 4090", "sjtu-medialab/RwkvCompress",
              "−15.26, VTM-9.1; −13.68, VTM-21", "LALIC"),
    Published("DCAE", "119.2", "963 k per pixel, counted; no scan",
              "encoding 93 ms, decoding 100 ms, GPU not recorded here", "LabShuHangGU/DCAE",
              "−17.0, VTM-12.1; −15.40, VTM-21", "DCAE"),
    Published("HPCM-Base", "68.50", "919 k per pixel; no scan",
              "decoding 81 ms, GPU not recorded here", "lyq133/LIC-HPCM", "−15.31, VTM-22"),
    Published("HPCM-Large", "89.71", "1261 k per pixel; no scan",
              "decoding 90 ms, GPU not recorded here", "lyq133/LIC-HPCM", "−19.19, VTM-22"),
    Published("TCM, large", "75.9 stated, 76.57 counted", "1846 k per pixel, counted; no scan",
              "decoding 151 and 202 ms, by source and GPU", "jmliu206/LIC_TCM",
              "−10.04, VTM-21; −11.8, VTM-12.1", "TCM-Large"),
    Published("FTIC", "69.8 to 71.0", "1096 k per pixel; no scan",
              "decoding over 1 s, GPU not recorded here", "qingshi9974/ICLR2024-FTIC",
              "−12.94, VTM-21"),
)  # fmt: skip
