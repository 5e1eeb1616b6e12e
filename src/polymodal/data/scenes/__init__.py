"""The embedded corpus ``scenes``: one latent scene as picture, sound, video, point cloud, motion and words."""

from polymodal.data.scenes.corpus import make_scenes, scene_samples, text_samples
from polymodal.data.scenes.latent import HELD_OUT, Scene, make_scene
from polymodal.data.scenes.questions import FAMILIES, Question, questions

__all__ = [
    "FAMILIES",
    "HELD_OUT",
    "Question",
    "Scene",
    "make_scene",
    "make_scenes",
    "questions",
    "scene_samples",
    "text_samples",
]
