"""Evaluating a run for its report: what stops it is one line, and names what is to be mended."""

import re
from pathlib import Path

import pytest

from data_shards.errors import UserError
from data_shards.pack import Source
from pipeline.evaluate.run import evaluate_run, open_tiles
from tests.photos import write_tiles
from tests.pipeline.evaluate.sets import packed
from tests.pipeline.test_export import a_run


def test_an_image_that_does_not_decode_is_named_with_what_to_type(tmp_path: Path) -> None:
    run, _ = a_run(tmp_path, 3)
    files = sorted(write_tiles(tmp_path / "photos", 30, 72).glob("*/*.jpg"))
    files[7].write_bytes(broken := files[7].read_bytes()[:-400])
    sources = [Source(str(file), name=file.name, label=file.parent.name) for file in files]
    bank = packed(tmp_path / "bank", sources[8:]).store.url
    shards = packed(tmp_path / "set", sources, decode="header")
    (key,) = [row["key"] for row in shards.table().to_pylist() if row["size"] == len(broken)]
    url = re.escape(shards.store.url)
    with pytest.raises(UserError, match=rf"^{url}: image {key}: does not decode: .*; make verify DST={url} FULL=1 "):
        evaluate_run(run, open_tiles(bank), open_tiles(shards.store.url))
