"""Where images come from: folders and lists of files, what is held out, what is labelled, what cannot be read."""

from adaptkit.sources.bad_images import BadImages as BadImages
from adaptkit.sources.cache import DecodeCache as DecodeCache
from adaptkit.sources.cache import is_large as is_large
from adaptkit.sources.cache import refuse_foreign as refuse_foreign
from adaptkit.sources.decoding import ImageFacts as ImageFacts
from adaptkit.sources.decoding import decode as decode
from adaptkit.sources.decoding import image_facts as image_facts
from adaptkit.sources.duplicates import dhash as dhash
from adaptkit.sources.duplicates import near_duplicates as near_duplicates
from adaptkit.sources.folder import FolderSource as FolderSource
from adaptkit.sources.folder import evenly_spaced as evenly_spaced
from adaptkit.sources.folder import fingerprint as fingerprint
from adaptkit.sources.images import open_folder as open_folder
from adaptkit.sources.images import open_images as open_images
from adaptkit.sources.index import load_index as load_index
from adaptkit.sources.index import save_index as save_index
from adaptkit.sources.labels import Labelled as Labelled
from adaptkit.sources.labels import halve as halve
from adaptkit.sources.labels import has_class_folders as has_class_folders
from adaptkit.sources.labels import open_labelled as open_labelled
from adaptkit.sources.pixels import Scale as Scale
from adaptkit.sources.source import BadImage as BadImage
from adaptkit.sources.source import ImageSource as ImageSource
from adaptkit.sources.splits import Split as Split
from adaptkit.sources.splits import same_content as same_content
from adaptkit.sources.splits import split as split
