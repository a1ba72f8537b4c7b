"""The table of formats, at a shape that takes no time."""

from train.lab import benchmark_formats


def test_names_every_format_with_memory_and_speed(capsys, monkeypatch, tmp_path):
    tiny = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "intermediate_size": 64, "n_routed_experts": 0}  # fmt: skip
    monkeypatch.setattr(benchmark_formats, "SHAPES", {"default": tiny})
    monkeypatch.setattr(benchmark_formats, "NEW_TOKENS", 2)
    flags = ["--turns", "1", "--png", str(tmp_path / "a.png")]
    monkeypatch.setattr("sys.argv", ["benchmark_formats.py", *flags])
    benchmark_formats.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if " rows: " in line]
    assert [line.split("  ")[1].strip() for line in lines] == list(benchmark_formats.FORMATS)
    for line in lines:
        assert line.count("tokens/s, ratio") == len(benchmark_formats.ROWS) and " MB, decoder " in line
    assert (tmp_path / "a.png").stat().st_size > 1000
