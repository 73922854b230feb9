"""What was done to a model, and how is that written down?"""

from secateur.reports._figures import histogram as histogram
from secateur.reports._figures import thumbnail as thumbnail
from secateur.reports._figures import versions as versions
from secateur.reports._packing import Choice as Choice
from secateur.reports._packing import PackedLayer as PackedLayer
from secateur.reports._packing import PackReport as PackReport
from secateur.reports._packing import speeds as speeds
from secateur.reports._page import comparison_page as comparison_page
from secateur.reports._pruning import Comparison as Comparison
from secateur.reports._pruning import Evaluation as Evaluation
from secateur.reports._pruning import Histogram as Histogram
from secateur.reports._pruning import LayerReport as LayerReport
from secateur.reports._pruning import Report as Report
from secateur.reports._pruning import SkippedLayer as SkippedLayer
