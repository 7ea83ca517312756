"""The pipeline whose communication lanes need no SM: copies on the compute lane, and ends thinner than a chunk.

On a GPU an attention kernel may hold every SM until it ends. Then whatever a communication lane runs on SMs, its
packing and the copy of its own share included, waits for that end, and nothing overlaps. Here both communication lanes
move bytes and do nothing else:

- the compute lane packs chunk 0, and the other chunks while chunk 0 is on the wire; the own share is copied where it is
  read, and never sent (Gloo has no all-to-all that leaves a share out);
- returns have a lane of their own, so that none queues behind an exchange;
- the compute lane unpacks behind the last attention, all but the last chunk while the last return is on the wire;
- the first chunk's keys and values come first and its queries in parts, each attended to as it arrives; the last
  chunk's rows are attended to and leave in parts. Rows of attention do not depend on each other.

The paper does none of this.
"""

from __future__ import annotations

from hcms.schedule.schedule import COMM, COMM_OUT, COMPUTE, COMPUTE_2, Op, Schedule


def zero(
    cut: tuple[int, ...],
    *,
    ends: tuple[int, int] = (1, 1),
    fill: bool = False,
    comm_sms: int = 0,
    on_host: bool = False,
) -> Schedule:
    """The schedule of `hcms-zero`.

    Args:
        cut: heads of each chunk.
        ends: into how many parts the first chunk's queries and the last chunk's rows are split; one chunk takes the
            larger.
        fill: attention of neighbouring chunks on two lanes of equal priority: the next chunk's blocks take the SMs that
            the last wave of this one leaves idle.
        comm_sms: SMs that the communication lanes keep, for a transport whose exchanges are kernels (NCCL).
        on_host: issue every exchange before the first attention (CPU, where the issuing thread attends); a GPU's host
            issues what is needed first.

    Raises:
        ValueError: fewer than one part at an end.
    """
    if min(ends) < 1:
        raise ValueError(f"ends need at least 1 part each, got {ends[0]} and {ends[1]}")
    chunks = len(cut)
    parts = [1] * chunks
    parts[0] = ends[0]
    parts[-1] = max(parts[-1], ends[1]) if chunks == 1 else ends[1]
    ops: list[Op] = []

    def add(op: Op) -> int:
        ops.append(op)
        return len(ops) - 1

    packed: dict[int, int] = {}
    arrived: dict[tuple[int, int], tuple[int, ...]] = {}  # chunk, part -> the exchanges that it needs
    attended: dict[tuple[int, int], int] = {}
    returned: dict[tuple[int, int], int] = {}

    def pack(chunk: int) -> None:
        packed[chunk] = add(Op("pack", chunk, COMPUTE, part=(0, parts[chunk])))

    def exchange(chunk: int) -> None:
        after, n = (packed[chunk],), parts[chunk]
        if n == 1:
            arrived[chunk, 0] = (add(Op("exchange", chunk, COMM, after)),)
            return
        kv = add(Op("exchange", chunk, COMM, after, "kv"))
        for i in range(n):
            arrived[chunk, i] = (kv, add(Op("exchange", chunk, COMM, after, "q", (i, n))))

    def attend(chunk: int) -> None:
        for i in range(parts[chunk]):
            lane = COMPUTE_2 if fill and len(attended) % 2 else COMPUTE
            attended[chunk, i] = add(Op("attend", chunk, lane, arrived[chunk, i], part=(i, parts[chunk])))
            returned[chunk, i] = add(Op("return", chunk, COMM_OUT, (attended[chunk, i],), part=(i, parts[chunk])))

    pack(0)
    exchange(0)
    for chunk in range(1, chunks):
        pack(chunk)
        if on_host:
            exchange(chunk)
    for chunk in range(chunks):
        attend(chunk)
        if not on_host and chunk + 1 < chunks:
            exchange(chunk + 1)
    for (chunk, i), back in returned.items():
        add(Op("unpack", chunk, COMPUTE, (back,), part=(i, parts[chunk])))
    name = "zero" + (f"/ends={parts[0]},{parts[-1]}" if max(parts) > 1 else "") + ("/filled" if fill else "")
    return Schedule(name + (f"/comm-sms={comm_sms}" if comm_sms else ""), cut, tuple(ops), comm_sms)
