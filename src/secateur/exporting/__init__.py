"""How does a model get into another engine?"""

from secateur.exporting._stub import export as export
from secateur.exporting._stub import export_directory as export_directory
from secateur.exporting._stub import is_exported as is_exported
from secateur.exporting._stub import open_exported as open_exported
