"""What a sound file says of its own length, against what is there.

libsndfile reads what is left of a torn file without a word, and nothing of a file whose writer
could not go back to fill in the length, as behind a pipe. So sizes are compared first, for the
formats that state them in their header: WAV (RIFF, RIFX, RF64), AIFF, AU and NIST SPHERE.
"""

import struct

_NO_SIZE_BELOW = 1 << 16
"""Writers to a pipe put 0, or the largest size that they know less their header: SoX 0x7ffff000
(and 0x7f000000 in AIFF), others 0x7fffffff, 0x80000000 or 0xffffffff. So close to these it is
none."""


class BadAudio(ValueError):
    """A recording that cannot be used; the message says why."""


def whole(data: bytes) -> bytes:
    """A sound file whose header states the size that it has.

    Raises: BadAudio: the file ends before the sound that its header states does.
    """
    if data[:4] in (b"RIFF", b"RIFX", b"RF64", b"BW64") and data[8:12] == b"WAVE":
        return _wav(data)
    if data[:4] == b"FORM" and data[8:12] in (b"AIFF", b"AIFC"):
        return _aiff(data)
    if data[:4] == b".snd" and len(data) >= 24:
        first, size = struct.unpack(">II", data[4:12])
        if not _is_placeholder(size):
            _check(len(data) - first, size)
    if data[:7] == b"NIST_1A":
        _check_sphere(data)
    return data


def _wav(data: bytes) -> bytes:
    order = ">" if data[:4] == b"RIFX" else "<"
    block, large = 1, None
    for chunk, at, size in _chunks(data, order):
        left = len(data) - at
        if chunk == b"ds64" and left >= 16:  # RF64 has its sizes here
            large = struct.unpack("<Q", data[at + 8 : at + 16])[0]
        if chunk == b"fmt " and left >= 14:
            block = max(1, struct.unpack(order + "H", data[at + 12 : at + 14])[0])
        if chunk == b"data":
            if large is not None and size == 0xFFFFFFFF:
                if not _is_placeholder(large):
                    _check(left, large)
                return data
            if not _is_placeholder(size) or (size == 0 and _are_chunks(data[at:], order)):
                _check(left, size)
                return data
            return _with(data, order, {4: len(data) - 8, at - 4: left - left % block})
    raise BadAudio("truncated: the header ends before the sound")


def _aiff(data: bytes) -> bytes:
    frame, counted = 1, 0
    for chunk, at, size in _chunks(data, ">"):
        left = len(data) - at
        if chunk == b"COMM" and left >= 8:
            channels, _, bits = struct.unpack(">HIH", data[at : at + 8])
            frame, counted = max(1, channels * -(-bits // 8)), at + 2
        if chunk == b"SSND":
            if not _is_placeholder(size):
                _check(left, size)
                return data
            sound = max(0, left - 8) // frame * frame
            sizes = {4: len(data) - 8, at - 4: sound + 8}
            return _with(data, ">", sizes | ({counted: sound // frame} if counted else {}))
    raise BadAudio("truncated: the header ends before the sound")


def _check_sphere(data: bytes) -> None:
    """SPHERE: lines `sample_count -i 16000` in a header whose length is its second line."""
    try:
        length = int(data[8:16])
        fields = dict(
            (words[0], words[2])
            for line in data[:length].decode("latin-1").split("\n")
            if len(words := line.split()) == 3
        )
        if "," not in fields.get("sample_coding", "pcm"):  # compressed behind a comma
            frame = int(fields.get("channel_count", 1)) * int(fields["sample_n_bytes"])
            _check(len(data) - length, int(fields["sample_count"]) * frame)
    except (KeyError, ValueError) as error:
        if isinstance(error, BadAudio):
            raise


def _chunks(data: bytes, order: str):
    """(name, where its content begins, size) of every chunk of a RIFF or IFF file."""
    at = 12
    while at + 8 <= len(data):
        size = struct.unpack(order + "I", data[at + 4 : at + 8])[0]
        yield data[at : at + 4], at + 8, size
        at += 8 + size + size % 2


def _are_chunks(data: bytes, order: str) -> bool:
    """Whether the rest of a file is chunks and no sound."""
    at = 0
    for name, begin, size in _chunks(b" " * 12 + data, order):
        if not (name.isascii() and name.decode().isprintable()):
            return False
        at = begin - 12 + size
    return at in (len(data), len(data) - 1)


def _is_placeholder(size: int) -> bool:
    return size == 0 or any(
        abs(most - size) < _NO_SIZE_BELOW
        for most in (0x7F000000, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
    )


def _check(left: int, size: int) -> None:
    if size > left:
        raise BadAudio(f"truncated: {max(0, left)} of {size} bytes of sound")


def _with(data: bytes, order: str, sizes: dict[int, int]) -> bytes:
    """`data` with these 32-bit numbers at these places."""
    changed = bytearray(data)
    for at, size in sizes.items():
        struct.pack_into(order + "I", changed, at, min(size, 0xFFFFFFFF))
    return bytes(changed)
