"""Flow matching: paths, times, objective, guidance and samplers. Models are callables."""

from rae.flow.composed import ComposedGuidance
from rae.flow.counting import evaluations
from rae.flow.guidance import AutoGuidance, ClassifierFreeGuidance, Guidance, InternalGuidance, NoGuidance
from rae.flow.mean_flow import ConsistencyMidTraining, ImprovedMeanFlow, JumpSampler, MeanFlow
from rae.flow.needs import check_guidance
from rae.flow.objective import FlowMatching
from rae.flow.ode import (
    AdaptiveSampler,
    EulerSampler,
    Heun3Sampler,
    HeunEulerSampler,
    HeunSampler,
    MidpointSampler,
    ODESampler,
    RK4Sampler,
)
from rae.flow.path import Coefficients, GVPPath, LinearPath, Path, PathSample, VPPath
from rae.flow.projected import AdaptiveProjectedGuidance, ClassifierFreeZeroStarGuidance
from rae.flow.sampler import Sampler
from rae.flow.sde import EulerMaruyamaSampler, SDESampler, StochasticHeunSampler
from rae.flow.time import (
    FullGrid,
    LogitNormalTime,
    OfficialGrid,
    PublishedGrid,
    UniformTime,
    dimension_shift,
    shift_time,
)

__all__ = [
    "AdaptiveProjectedGuidance",
    "AdaptiveSampler",
    "AutoGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "Coefficients",
    "ComposedGuidance",
    "ConsistencyMidTraining",
    "EulerMaruyamaSampler",
    "EulerSampler",
    "FlowMatching",
    "FullGrid",
    "GVPPath",
    "Guidance",
    "Heun3Sampler",
    "HeunEulerSampler",
    "HeunSampler",
    "ImprovedMeanFlow",
    "InternalGuidance",
    "JumpSampler",
    "LinearPath",
    "LogitNormalTime",
    "MeanFlow",
    "MidpointSampler",
    "NoGuidance",
    "ODESampler",
    "OfficialGrid",
    "Path",
    "PathSample",
    "PublishedGrid",
    "RK4Sampler",
    "SDESampler",
    "Sampler",
    "StochasticHeunSampler",
    "UniformTime",
    "VPPath",
    "check_guidance",
    "dimension_shift",
    "evaluations",
    "shift_time",
]
