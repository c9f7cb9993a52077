"""`python -m regard.testing TARGET…`: the checks of `regard check`, plainly printed."""

import sys

from . import resolve, run

failed = 0
for target in sys.argv[1:]:
    for subject in resolve(target):
        for outcome in run(subject):
            failed += outcome.status == "fail"
            sys.stdout.write(f"{outcome.status:4} {outcome.seconds:5.1f}s {outcome.subject}: {outcome.check} {outcome.message}\n")
            sys.stdout.flush()
sys.exit(failed > 0)
