"""Pillow reads and writes .cmb files once this module has been imported.

    import cmamba_ref.pillow_plugin

    with Image.open("photo.cmb") as image:  # size, mode and metadata
        image.load()  # decodes, as does any access to pixels
    image.save("copy.cmb", quality=5)

Options of `save`; others are ignored, as Pillow's own formats do:

    quality: 1 (small) to 8 (good), any number in between; 4 where it is left out. Not 1 to 100.
    effort: 0 (fast) to 9 (slow), as in `cmamba_ref.encode`; 0 where it is left out.
    model: the name of a bundled model, a directory with one, a repository of the Hugging Face
        Hub, or a `CMamba`; "tiny" where it is left out.
    exif, icc_profile, xmp: bytes to keep, or an `Image.Exif`; none where they are left out. The
        image is turned by the orientation in `exif`, which becomes 1; by that of its own EXIF data
        where none is given. With a profile, the pixels are taken to be in it; without, that of the
        image is applied, or ignored with an `ImageWarning` if it cannot be.
    max_pixels, max_memory: as in `cmamba_ref.encode`.

A .cmb file holds images of the modes L, LA, RGB and RGBA. `save` treats other modes as `cmamba
encode` treats files (`cmamba_ref.codec.images`): black-and-white becomes L, palettes and YCbCr
become RGB or RGBA; CMYK, 16 bits and animations are refused. What was kept is in the `info` of an
opened file, under the names of the options; without a profile its pixels are in sRGB.

A file of a model that is not bundled opens, and decodes after `use_model`, or after a `save` with
that model's name. Pillow's limit on pixels, `Image.MAX_IMAGE_PIXELS`, holds when a file is opened.

A faulty file or image raises a `PillowError`, which is an `OSError` and has the reason as its
cause. Pillow empties an existing file before `save` begins, and it is lost if that fails; of
colours with 16 bits it may keep 8 when it loads them, of grey with 2 or 4 bits it loses which level
is transparent, and of a PNG file the chunk cICP; none can be noticed here.

torch is imported when the first image is decoded or encoded.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING

from PIL import Image, ImageFile

from cmamba_ref.codec.container import HEADER_BYTES, MAGIC, Container, Header
from cmamba_ref.codec.metadata import EXIF_PREFIX, Metadata
from cmamba_ref.errors import BitstreamError, ImageError, ModelMismatchError, PillowError

if TYPE_CHECKING:
    from cmamba_ref.model import CMamba

FORMAT = "CMAMBA"
EXTENSION = ".cmb"
MIME = "image/x-cmamba"

# Models that were named, given or needed, by what identified them: weights are loaded once.
_models: dict[bytes | int, CMamba] = {}
_models_guard = threading.Lock()


def use_model(model: str | os.PathLike | CMamba | None) -> CMamba:
    """Decode files of this model from now on; it stays in memory.

    Args:
        model: as the option of `save`.

    Raises:
        InvalidArgumentError: it is no model.
        WeightsError: nothing there, damaged, or not to be downloaded.
    """
    from cmamba_ref.codec import loaded_or_given

    used = loaded_or_given(model)
    with _models_guard:
        # By the object: its weights, and with them its id, may change.
        return _models.setdefault(id(used), used)


def _model_of(model_id: bytes) -> CMamba:
    """Return the model of an id, from those in use or the bundled ones."""
    from cmamba_ref.codec import model_for

    with _models_guard:
        model = model_for(model_id, _models.values())
        _models[model_id] = model
        return model


class CMambaImageFile(ImageFile.ImageFile):
    """A .cmb file that has been opened, and not decoded yet."""

    format = FORMAT
    format_description = "CMamba learned image codec"
    # True also for what Pillow makes of it without opening a file, by unpickling.
    _is_decoded = True

    def _open(self) -> None:
        assert self.fp is not None  # for the type checker
        with _told_as_pillow_does("cannot open:"):
            header = Header.unpack(self.fp.read(HEADER_BYTES))
        self._size = header.width, header.height
        self._mode = ("L" if header.grey else "RGB") + ("A" if header.alpha else "")
        self.fp.seek(0)
        # Damage is reported by `load`: Pillow takes an error here for another program's file.
        with suppress(BitstreamError):
            metadata = Container.unpack(self.fp.read()).metadata
            self.info |= metadata.present()
            if metadata.exif is not None:
                self.info["exif"] = EXIF_PREFIX + metadata.exif
        self.tile = []  # `load` leaves Pillow nothing to decode
        self._is_decoded = False

    def verify(self) -> None:
        """Compare the file with its checksum, without decoding; open it anew to read it then.

        Raises:
            PillowError: it is damaged.
        """
        assert self.fp is not None  # for the type checker
        self.fp.seek(0)
        with _told_as_pillow_does("cannot verify:"):
            Container.unpack(self.fp.read())
        super().verify()

    def load(self) -> Image.core.PixelAccess | None:
        """Decode the file, unless that is done; Pillow calls this whenever it needs pixels.

        Not a decoder of Pillow's, for which it makes room beforehand: a file of a hundred bytes may
        declare so many rows that these alone take a gigabyte.

        Raises:
            PillowError: damaged, of a model that is not available, too large, or closed by now.
            MemoryLimitError: more memory is needed than there is.
        """
        if not self._is_decoded:
            if self.fp is None:
                raise PillowError("cannot decode: the file is closed; open it anew")
            self.im, self.readonly = self._decoded().im, 0
            self._is_decoded = True
            if self._exclusive_fp:
                self.fp.close()
            self.fp = None
        return super().load()

    def _decoded(self) -> Image.Image:
        """Return the image, in memory that may be written to."""
        from cmamba_ref.codec import DEFAULT_MAX_PIXELS, decode_container

        assert self.fp is not None  # for the type checker
        self.fp.seek(0)
        # Pillow has refused what has more than twice as many pixels as its limit.
        allowed = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else sys.maxsize
        with _told_as_pillow_does("cannot decode:"):
            file = Container.unpack(self.fp.read())
            model, most = _model_of(file.model_id), max(DEFAULT_MAX_PIXELS, allowed)
            pixels = decode_container(file, model, max_pixels=most)
        channels = () if self.mode == "L" else (len(self.mode),)
        if pixels.shape != (*self.size[::-1], *channels):
            raise PillowError("cannot decode: the file has changed since it was opened")
        return Image.frombytes(self.mode, self.size, pixels.tobytes())


def _save(im: Image.Image, fp: IO[bytes], filename: str | bytes) -> None:
    from cmamba_ref.codec import DEFAULT_MAX_PIXELS, encode, images, is_model

    options = im.encoderinfo
    model = options.get("model")
    exif, xmp = options.get("exif"), options.get("xmp")
    with _told_as_pillow_does("cannot save: the image"):
        given = Metadata(
            (exif.tobytes() if isinstance(exif, Image.Exif) else exif) or None,
            options.get("icc_profile") or None,
            (xmp.encode() if isinstance(xmp, str) else xmp) or None,
        )
        orientation = images.orientation_in(given) if given.exif else None
        images.refuse_what_would_be_lost(im)
        icc = None
        if given.icc_profile:
            images.check_profile(im, given.icc_profile)
        else:
            icc = images.profile_of(im, "the image")
        image = images.to_array(im, icc=icc, orientation=orientation)
        kept = images.upright_metadata(given, "the image")
    data = encode(
        image,
        model if is_model(model) else use_model(model),
        options.get("quality"),
        effort=options.get("effort") or 0,
        metadata=kept,
        max_pixels=options.get("max_pixels") or DEFAULT_MAX_PIXELS,
        max_memory=options.get("max_memory"),
    )
    fp.write(data)


@contextmanager
def _told_as_pillow_does(what: str) -> Iterator[None]:
    """Turn an error of a file or image into an OSError; the reason stays its cause."""
    try:
        yield
    except ModelMismatchError as error:
        raise PillowError(
            f"{what} {error}; name it with cmamba_ref.pillow_plugin.use_model"
        ) from error
    except (BitstreamError, ImageError) as error:
        raise PillowError(f"{what} {error}") from error


def _accept(prefix: bytes) -> bool:
    return prefix.startswith(MAGIC)


Image.register_open(FORMAT, CMambaImageFile, _accept)
Image.register_save(FORMAT, _save)
Image.register_extension(FORMAT, EXTENSION)
Image.register_mime(FORMAT, MIME)
