from llava.progress import Progress


def test_lines_where_there_is_no_terminal(capfd):
    with Progress("forward", 5) as bar:
        bar.advance(3, bad=1)
        bar.advance(2)
    assert "forward: 5/5 samples" in (told := capfd.readouterr().err)
    assert "1 unusable" in told and told.count("\n") == 1


def test_lines_come_every_now_and_then(capfd, monkeypatch):
    monkeypatch.setattr("llava.progress.SECONDS", 0)
    with Progress("forward", 4) as bar:
        for _ in range(4):
            bar.advance(1)
    told = capfd.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["1/4", "2/4", "3/4", "4/4", "4/4"]


def test_silent_when_not_shown(capfd):
    with Progress("forward", 1, shown=False) as bar:
        bar.advance(1)
    assert not capfd.readouterr().err
