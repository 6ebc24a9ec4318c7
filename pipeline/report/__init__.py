"""Reports on a run: the same facts as data (``collect``), as plots (``plots``) and as a page (``page``).

from tropd.pipeline.report.collect import build_report   # -> Report; no matplotlib needed
from tropd.pipeline.report.page import write_report      # -> path of report/index.html
"""
