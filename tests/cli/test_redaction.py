"""What may leave the machine in a support bundle."""

from __future__ import annotations

import pytest

from xditd.cli.support import redaction
from xditd.cli.support.redaction import PUBLIC, REDACTED, SECRET
from xditd.daemon.config import Config
from xditd.daemon.config_file import known_keys


def test_every_key_of_the_configuration_is_known_to_be_harmless_or_secret():
    """A new key is redacted until somebody has thought about it; this is where they are made to."""
    assert set(known_keys(Config)) <= PUBLIC | SECRET
    assert not PUBLIC & SECRET


def test_a_configuration_keeps_what_is_harmless_and_nothing_else():
    plain = {
        "endpoint": "tcp://me:hunter2@10.0.0.1:5555",
        "devices": {"kind": "cuda", "use": ["0"]},
        "models": {"comfyui": "/home/ada/ComfyUI", "folders": {"vae": ["/home/ada/vae"]}},
        "debug": {
            "echo": True,
            "rank_options": {"anything": "a secret"},
            "rank_command": ["prog", "a secret"],
        },
        "future": {"curve_key": "a secret", "deeper": {"x": "a secret"}},
        "misspelt": "a secret",
    }
    shown = redaction.configuration(plain, "/home/ada")
    assert shown["endpoint"] == f"tcp://{REDACTED}@10.0.0.1:5555"
    assert shown["devices"] == {"kind": "cuda", "use": ["0"]}
    assert shown["models"] == {"comfyui": "~/ComfyUI", "folders": {"vae": ["~/vae"]}}
    assert shown["debug"] == {"echo": True, "rank_options": REDACTED, "rank_command": REDACTED}
    assert shown["future"] == {"curve_key": REDACTED, "deeper": {"x": REDACTED}}
    assert "a secret" not in repr(shown)
    assert "hunter2" not in repr(shown)


@pytest.mark.parametrize(
    "written",
    [
        "HF_TOKEN=s3cr3tvalue ran",
        'token: "s3cr3tvalue"',
        "{'api_key': 's3cr3tvalue'}",
        '{"password": "s3cr3tvalue", "x": 1}',
        "Authorization: Bearer s3cr3tvalue",
        "authorization: Basic s3cr3tvalue",
        "https://user:s3cr3tvalue@host/x",
        "download with hf_s3cr3tvalueabcdefghij done",
        "-----BEGIN PRIVATE KEY-----\ns3cr3tvalue\n-----END PRIVATE KEY-----",
        "xditd_curve_secret = s3cr3tvalue",
    ],
)
def test_what_looks_secret_is_out(written):
    assert "s3cr3tvalue" not in redaction.text(written)
    assert REDACTED in redaction.text(written)


@pytest.mark.parametrize(
    "written",
    [
        "77 tokens in 0.2 s",
        "attention: flash, dtype: bfloat16",
        "❌ groups: flux1-dev.safetensors failed: Rank 0 was killed by SIGKILL. (group g1, code rank_lost)",
        "http://127.0.0.1:9469/metrics",
        "token_embedding.weight [49408, 768]",
    ],
)
def test_what_is_not_secret_stays(written):
    assert redaction.text(written) == written


def test_the_home_folder_is_no_name():
    assert redaction.text("/home/ada/x and /home/adam/y", "/home/ada") == "~/x and /home/adam/y"
    assert redaction.text("/x", "/") == "/x"


def test_labels_are_counted_and_not_shown():
    shown = redaction.report({"runs": [{"run": 1, "label": "a red fox"}, {"run": 2, "label": ""}]})
    assert shown["runs"] == [{"run": 1, "label": "<9 characters>"}, {"run": 2, "label": ""}]
