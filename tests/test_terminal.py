"""What a person reads in a terminal, and what stays out of a file or a pipe."""

from toy import Toy

import deltaworks as dw


def test_a_report_is_an_aligned_table() -> None:
    delta = dw.attach(Toy(32), "lora", rank=2, targets="mlp")
    for parameter in delta.parameters():
        parameter.data.fill_(1.0)
    # two blocks: up [64, 32] and down [32, 64], rank 1 since all entries are the same
    assert str(delta.report(ranks=True)).splitlines() == [
        "lora[targets=mlp, rank=2] on Toy",
        "trainable  768 of 17,152 (4.48 %)",
        "changed    8,192",
        "stored     3,072 bytes",
        "",
        "role      sites  trainable  changed  rank of the change",
        "mlp.up        2        384    4,096                   1",
        "mlp.down      2        384    4,096                   1",
    ]


def test_ranks_that_were_not_asked_for_have_no_column() -> None:
    delta = dw.attach(Toy(32), "lora[rank=2]+parallel[width=4]")
    lines = str(delta.report()).splitlines()
    assert lines[5].split() == ["role", "sites", "trainable", "changed"]
    assert len({len(line) for line in lines[5:]}) == 1
    assert max(map(len, lines)) <= 80
