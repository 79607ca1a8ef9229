"""Paths and URLs are taken apart alike, and queries are kept from logs."""

import pytest

from data_pipeline.storage.locations import (
    base_name,
    beside,
    folder_of,
    identity,
    inside,
    is_url,
    without_secrets,
)

SIGNED = "https://ann:pw@host:8080/a/b/x.tar?sig=hush&e=1#frag"


def test_urls_keep_their_query_for_the_server_and_hide_it_from_people():
    assert base_name(SIGNED) == "x.tar"
    assert beside(SIGNED, ".idx") == "https://ann:pw@host:8080/a/b/x.tar.idx?sig=hush&e=1#frag"
    assert inside(folder_of(SIGNED), "m.json").startswith(
        "https://ann:pw@host:8080/a/b/m.json?sig=hush"
    )
    assert without_secrets(SIGNED) == "https://host:8080/a/b/x.tar?..."
    assert identity(SIGNED) == "https://host:8080/a/b/x.tar"


@pytest.mark.parametrize(
    ("path", "folder", "name"),
    [
        ("s3://bucket/a/x.tar", "s3://bucket/a", "x.tar"),
        ("s3://bucket/a?b/x#1.tar", "s3://bucket/a?b", "x#1.tar"),
        ("https://host/x.tar", "https://host", "x.tar"),
        ("a/b/x.tar", "a/b", "x.tar"),
        ("x.tar", "", "x.tar"),
    ],
)
def test_folder_and_name(path, folder, name):
    assert (folder_of(path), base_name(path)) == (folder, name)
    assert inside(folder, name) == path
    assert beside(path, ".idx") == path + ".idx"


def test_what_is_a_url():
    assert is_url("s3://a") and is_url("memory://x/y.tar") and is_url("HTTP://h/x")
    for path in ("a/b.tar", "/a://b", "C:\\x", "pipe:cat x", "a//b"):
        assert not is_url(path)
        assert without_secrets(path) == path
