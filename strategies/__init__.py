"""Strategies: the server side. One strategy a file; a user's plug-in looks exactly like ours."""

from strategies.average import Average
from strategies.base import FederatedStrategy, Outgoing, Reply, weighted_mean
from strategies.central import Central
from strategies.disjoint import Disjoint
from strategies.fed_sb import FedSB
from strategies.fedex import FedEx
from strategies.fedit import FedIT
from strategies.fedproto import FedProto
from strategies.fedsa import FedSA
from strategies.fedsvd import FedSVD
from strategies.flexlora import FlexLoRA
from strategies.flora import FLoRA
from strategies.local import Local
from strategies.o_lora import OLora
from strategies.personal_lora import PersonalLora
from strategies.pfedlora import PFedLoRA
from strategies.ravan import Ravan
from strategies.rolora import RoLoRA
from strategies.zero_shot import ZeroShot

__all__ = [
    "Average",
    "Central",
    "Disjoint",
    "FLoRA",
    "FedEx",
    "FedIT",
    "FedProto",
    "FedSA",
    "FedSB",
    "FedSVD",
    "FederatedStrategy",
    "FlexLoRA",
    "Local",
    "OLora",
    "Outgoing",
    "PFedLoRA",
    "PersonalLora",
    "Ravan",
    "Reply",
    "RoLoRA",
    "ZeroShot",
    "weighted_mean",
]
