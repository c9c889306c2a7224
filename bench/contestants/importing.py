"""Times the import of one module in an interpreter that has imported little else. The order's only key: `module`."""

from __future__ import annotations

import importlib
import json
import sys
import time

module: str = json.loads(sys.argv[1])["module"]
started = time.perf_counter()
importlib.import_module(module)
print(json.dumps({"module": module, "seconds": time.perf_counter() - started}))
