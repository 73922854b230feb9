"""What was done to a model, and how is that written down?"""

from secateur.reports._figures import histogram as histogram
from secateur.reports._figures import thumbnail as thumbnail
from secateur.reports._figures import versions as versions
from secateur.reports._html import Fact as Fact
from secateur.reports._html import tables_page as tables_page
from secateur.reports._packing import PackReport as PackReport
from secateur.reports._page import comparison_page as comparison_page
from secateur.reports._page import require_page_extra as require_page_extra
from secateur.reports._pruning import PRUNING_REPORT as PRUNING_REPORT
from secateur.reports._pruning import Report as Report
from secateur.reports._records import Choice as Choice
from secateur.reports._records import Comparison as Comparison
from secateur.reports._records import Evaluation as Evaluation
from secateur.reports._records import Histogram as Histogram
from secateur.reports._records import LayerReport as LayerReport
from secateur.reports._records import PackedLayer as PackedLayer
from secateur.reports._records import SkippedLayer as SkippedLayer
from secateur.reports._rows import comparison_table as comparison_table
from secateur.reports._rows import evaluation_table as evaluation_table
from secateur.reports._rows import packed_table as packed_table
from secateur.reports._rows import pruned_table as pruned_table
from secateur.reports._rows import skipped_table as skipped_table
from secateur.reports._tables import Table as Table
from secateur.reports._tables import TableColumn as TableColumn
from secateur.reports._tables import bars as bars
