"""A clip with Wan2.2 on several devices: wan_plain.py and the two lines that name hcms.

torchrun --nproc_per_node 4 examples/wan_two_lines.py --weights Wan-AI/Wan2.2-T2V-A14B-Diffusers --output clip.mp4

README.md beside this says how to try it with a small random model, and what must be equal to what.
"""

import argparse
import os

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

import hcms

parser = argparse.ArgumentParser()
parser.add_argument("--weights", default="Wan-AI/Wan2.2-T2V-A14B-Diffusers", help="a folder, or a name on the hub")
parser.add_argument("--prompt", default="A cat and a dog bake a cake together in a sunlit kitchen.")
parser.add_argument("--frames", type=int, default=33)
parser.add_argument("--height", type=int, default=720)
parser.add_argument("--width", type=int, default=1280)
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--output", default="clip.mp4")
args = parser.parse_args()

cuda = torch.cuda.is_available()
vae = AutoencoderKLWan.from_pretrained(args.weights, subfolder="vae", torch_dtype=torch.float32)
dtype = torch.bfloat16 if cuda else torch.float32
pipe = WanPipeline.from_pretrained(args.weights, vae=vae, torch_dtype=dtype)
hcms.parallelize(pipe)
pipe.to("cuda" if cuda else "cpu")

clip = pipe(
    prompt=args.prompt,
    height=args.height,
    width=args.width,
    num_frames=args.frames,
    num_inference_steps=args.steps,
    guidance_scale=4.0,
    generator=torch.Generator().manual_seed(0),
).frames[0]
if os.environ.get("RANK", "0") == "0":
    export_to_video(clip, args.output, fps=16)
