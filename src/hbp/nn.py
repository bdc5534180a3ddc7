"""The layers that send curvature backward, and the bases of layers of one's own."""

from hbp.core.containers import HBPResidual as HBPResidual
from hbp.core.containers import HBPSequential as HBPSequential
from hbp.core.layers.convolution import HBPConv2d as HBPConv2d
from hbp.core.layers.elementwise import ElementwiseRule as ElementwiseRule
from hbp.core.layers.elementwise import HBPReLU as HBPReLU
from hbp.core.layers.elementwise import HBPSigmoid as HBPSigmoid
from hbp.core.layers.elementwise import HBPTanh as HBPTanh
from hbp.core.layers.linear import HBPLinear as HBPLinear
from hbp.core.layers.pooling import HBPMaxPool2d as HBPMaxPool2d
from hbp.core.layers.shape import HBPFlatten as HBPFlatten
from hbp.core.layers.shape import LinearRule as LinearRule
from hbp.core.module import HBPModule as HBPModule
from hbp.layers.activations import *  # noqa: F403  # It names nothing but layers.
from hbp.layers.convolution import HBPConv1d as HBPConv1d
from hbp.layers.convolution import HBPConv3d as HBPConv3d
from hbp.layers.convolution import HBPConvTranspose1d as HBPConvTranspose1d
from hbp.layers.convolution import HBPConvTranspose2d as HBPConvTranspose2d
from hbp.layers.convolution import HBPConvTranspose3d as HBPConvTranspose3d
from hbp.layers.dropout import HBPDropout as HBPDropout
from hbp.layers.dropout import HBPDropout1d as HBPDropout1d
from hbp.layers.dropout import HBPDropout2d as HBPDropout2d
from hbp.layers.dropout import HBPDropout3d as HBPDropout3d
from hbp.layers.functions import HBPElementwise as HBPElementwise
from hbp.layers.general import BilinearRule as BilinearRule
from hbp.layers.general import GeneralRule as GeneralRule
from hbp.layers.general import HBPLogSoftmax as HBPLogSoftmax
from hbp.layers.general import HBPSoftmax as HBPSoftmax
from hbp.layers.linear import *  # noqa: F403  # Nor does this.
from hbp.layers.normalization import HBPBatchNorm1d as HBPBatchNorm1d
from hbp.layers.normalization import HBPBatchNorm2d as HBPBatchNorm2d
from hbp.layers.normalization import HBPBatchNorm3d as HBPBatchNorm3d
from hbp.layers.normalization import HBPGroupNorm as HBPGroupNorm
from hbp.layers.normalization import HBPLayerNorm as HBPLayerNorm
from hbp.layers.normalization import HBPPReLU as HBPPReLU
from hbp.layers.normalization import HBPRMSNorm as HBPRMSNorm
from hbp.layers.pooling import HBPAdaptiveMaxPool1d as HBPAdaptiveMaxPool1d
from hbp.layers.pooling import HBPAdaptiveMaxPool2d as HBPAdaptiveMaxPool2d
from hbp.layers.pooling import HBPAdaptiveMaxPool3d as HBPAdaptiveMaxPool3d
from hbp.layers.pooling import HBPMaxPool1d as HBPMaxPool1d
from hbp.layers.pooling import HBPMaxPool3d as HBPMaxPool3d
from hbp.layers.shape import HBPIdentity as HBPIdentity
from hbp.layers.shape import HBPUnflatten as HBPUnflatten
