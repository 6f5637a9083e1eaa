"""python -m maxwhisper"""

import sys

from .cli import main

sys.exit(main())
