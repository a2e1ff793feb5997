"""`xditctl`: everything a person asks of a daemon. One file per group of commands; here they are put together."""

from __future__ import annotations

import click

from xditd import __version__
from xditd.cli.commands import Commands
from xditd.cli.demo import demo
from xditd.cli.doctor.command import doctor
from xditd.cli.events import events
from xditd.cli.logs import logs
from xditd.cli.models import free, load, models, sleep, unload
from xditd.cli.plan import plan
from xditd.cli.runs import cancel, drain, runs
from xditd.cli.sample import sample
from xditd.cli.status import status, wait_ready
from xditd.cli.support.command import support_bundle
from xditd.cli.top import top
from xditd.cli.verify import verify


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="xditctl")
def main() -> None:
    """Look at and steer xditd, the daemon that keeps diffusion models warm across GPUs.

    \b
    Exit status:
      0 done   1 failed   2 wrong command line   3 no daemon   4 refused   5 took too long   130 Ctrl-C
    """


for command in (
    status, top, events, logs, models, plan, load, unload, sleep, free, runs, cancel, sample, verify, demo, doctor, wait_ready, drain,
    support_bundle,
):  # fmt: skip
    main.add_command(command)

if __name__ == "__main__":
    main()
