"""Print one of the README's commands exactly as written: `python .ci/readme_command.py tests`.

A command is the shell block that follows the comment `<!-- command: NAME -->`.
"""

import re
import sys
from pathlib import Path

readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
found = re.search(rf"<!-- command: {re.escape(sys.argv[1])} -->\s*```(?:sh|bash|console)\n(.*?)```", readme, re.DOTALL)
if found is None:
    sys.exit(f"README.md has no command {sys.argv[1]!r}")
print(found[1].strip())
