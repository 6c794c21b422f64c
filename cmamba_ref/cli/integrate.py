"""What makes other programs know .cmb files; `cmamba integrate` prints it."""

from __future__ import annotations

from typing import NamedTuple


class Integration(NamedTuple):
    """A text for other programs.

    Attributes:
        content: what it is, in a few words.
        place: the file that it belongs into.
        activation: the command to run once it is there.
        text: ends in a newline.
    """

    content: str
    place: str
    activation: str
    text: str


INTEGRATIONS = {
    "mime": Integration(
        "the type image/x-cmamba, for desktops",
        "~/.local/share/mime/packages/cmamba.xml",
        "update-mime-database ~/.local/share/mime",
        """\
<?xml version="1.0" encoding="UTF-8"?>
<mime-info xmlns="http://www.freedesktop.org/standards/shared-mime-info">
  <mime-type type="image/x-cmamba">
    <comment>CMamba image</comment>
    <magic>
      <match type="string" offset="0" value="\\x8fCMB"/>
    </magic>
    <glob pattern="*.cmb"/>
  </mime-type>
</mime-info>
""",
    ),
    # The output goes through the shell: Tumbler (Xfce) has opened %o before and would not see the
    # file that replaces it, and other desktops give it a name that does not end in .png.
    "thumbnailer": Integration(
        "previews in file managers; needs mime",
        "~/.local/share/thumbnailers/cmamba.thumbnailer",
        "rm -rf ~/.cache/thumbnails/fail, then restart the file manager",
        """\
[Thumbnailer Entry]
TryExec=cmamba
Exec=sh -c 'exec cmamba decode "$1" --max-side "$2" -o - >"$3"' sh %i %s %o
MimeType=image/x-cmamba;
""",
    ),
    # %o has no suffix. ImageMagick reads every delegates.xml that it finds.
    "imagemagick": Integration(
        "a delegate, with which ImageMagick reads .cmb files",
        "~/.config/ImageMagick/delegates.xml (if that exists: only the line <delegate ...>)",
        "not needed",
        """\
<?xml version="1.0" encoding="UTF-8"?>
<delegatemap>
  <delegate decode="cmb" command="cmamba decode &quot;%i&quot; -o - &gt;&quot;%o&quot;"/>
</delegatemap>
""",
    ),
    # Of docs/format.md; the fields of later versions may lie elsewhere.
    "file": Integration(
        "a rule for file(1)",
        "~/.magic, or /etc/magic for all users",
        "not needed",
        """\
0	string	\\x8fCMB	CMamba image data
!:mime	image/x-cmamba
!:ext	cmb
>4	byte	x	\\b, version %d
>4	byte	0
>>14	ulelong	x	\\b, %u x
>>18	ulelong	x	%u
>>5	byte	&1	\\b, grey
>4	byte	1
>>22	ulelong	x	\\b, %u x
>>26	ulelong	x	%u
>>13	byte	&1	\\b, grey
>>13	byte	&2	\\b, with alpha
""",
    ),
}


def heading(name: str) -> str:
    """Return what a text is, where it goes and what activates it, in three lines."""
    content, place, activation, _ = INTEGRATIONS[name]
    return f"{name}: {content}\n  file: {place}\n  activate: {activation}"
