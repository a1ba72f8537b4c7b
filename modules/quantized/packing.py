"""Store two codes of 4 bits in one byte.

    byte = 16 * first + second          codes (.., n) of 0 .. 15  ->  bytes (.., n / 2), n even

The first code is in the high half, as in bitsandbytes. Codes of -8 .. 7 are stored 8 higher.
"""

import torch


def pack(codes):
    """codes (.., n), integers of 0 .. 15 -> (.., n / 2) uint8. Raise `ValueError` for an odd n."""
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} codes do not fill whole bytes: an even number is needed")
    codes = codes.to(torch.uint8)
    return codes[..., ::2] << 4 | codes[..., 1::2]


def unpack(packed):
    """packed (.., n / 2) uint8 -> codes (.., n) uint8."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)


def lesson():
    """Pack a few codes."""
    codes = torch.tensor([3, 15, 0, 9])
    packed = pack(codes)
    print("codes", codes.tolist(), "-> bytes", [f"{byte:08b}" for byte in packed.tolist()])
    print("and back:", unpack(packed).tolist())
    print(f"a million codes: {pack(torch.zeros(10**6)).nbytes:,} bytes; as fp32 numbers: {4 * 10**6:,}")


if __name__ == "__main__":
    lesson()
