"""A program of its own: LAZ file on standard input -> its unpacked records on standard output.

Run by ``las.py`` in a process apart, because the native unpacker trusts the sizes that a file states: a damaged chunk
table makes it ask for many gigabytes and abort the whole process. Imports nothing of the package, to start fast.

Arguments: offset of the point data, offset and length of the compression record, number of bytes to give.
"""

import io
import sys


def main() -> None:
    """Read, unpack and write; any failure ends the process with an error on standard error."""
    import lazrs

    start, record, length, size = (int(word) for word in sys.argv[1:5])
    data = sys.stdin.buffer.read()
    _limit_memory(2 * len(data) + 2 * size + (1 << 30))
    file = io.BytesIO(data)
    file.seek(start)
    unpacked = bytearray(size)
    lazrs.LasZipDecompressor(file, data[record : record + length]).decompress_many(unpacked)
    sys.stdout.buffer.write(unpacked)


def _limit_memory(num_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Not on Windows.
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes if hard < 0 else min(num_bytes, hard), hard))


if __name__ == "__main__":
    main()
