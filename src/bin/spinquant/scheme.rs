//! How a command says that the network is quantised.

use std::path::Path;

use spinquant::llama::LlamaConfig;
use spinquant::quant::{ClipRatios, Online, Scheme};
use spinquant::rotation::{ClipEnds, RotationFile, Rotations};
use spinquant::{Error, Result};

use crate::common::{contradicts, note};

/// How the network is quantised.
#[derive(clap::Args, Clone)]
pub struct SchemeArgs {
    /// Bits of weights, activations and KV cache, such as W4A4KV4 (16: not quantised; W4A4sKV4: with --symmetric-activations), or blocks
    /// of floating-point numbers for weights and activations, such as MXFP4KV4, NVFP4 or WMXFP4A16 [default: W4A4KV4].
    #[arg(long, value_name = "W.A.KV.")]
    scheme: Option<Scheme>,
    /// Symmetric activations, K and V (published: asymmetric).
    #[arg(long)]
    symmetric_activations: bool,
    /// Asymmetric weights (published: symmetric).
    #[arg(long)]
    asymmetric_weights: bool,
    /// Input channels that share a weight scale (published: the whole row).
    #[arg(long, value_name = "CHANNELS")]
    weight_group: Option<usize>,
    /// Do not search the weights' clip ratio.
    #[arg(long)]
    no_clip_search: bool,
    /// Clip ratios of activations, K and V: one number, or activations=R,key=R,value=R (also attention_input,
    /// attention_output, mlp_input, down_input). Default: what the rotation file holds, else 1.
    #[arg(long, value_name = "RATIOS")]
    activation_clip: Option<ClipRatios>,
    /// Hadamards that run with the rotated network: none, r3, r4 or r3,r4; r4=block:N transforms every N values of down's input by
    /// themselves, as runtimes do that have powers of two only. Default: what the rotation file was made for, else r3,r4.
    #[arg(long, value_name = "WHICH")]
    online: Option<Online>,
}

impl SchemeArgs {
    pub fn scheme(&self) -> Scheme {
        self.over(Scheme::new(4, 4, 4))
    }

    /// The scheme with the bits of another: the other arguments are for both.
    pub fn scheme_of(&self, given: Scheme) -> Scheme {
        let symmetric_activations = self.scheme().symmetric_activations;
        Self { scheme: Some(given), symmetric_activations, ..self.clone() }.scheme()
    }

    /// `scheme` with what the arguments change in it.
    fn over(&self, mut scheme: Scheme) -> Scheme {
        if let Some(given) = self.scheme {
            scheme = with_bits_of(&given, scheme);
        }
        scheme.online = self.online.unwrap_or(scheme.online);
        scheme.symmetric_activations |= self.symmetric_activations;
        scheme.symmetric_weights &= !self.asymmetric_weights;
        scheme.weight_group = self.weight_group.or(scheme.weight_group);
        scheme.activation_clip = self.activation_clip.unwrap_or(scheme.activation_clip);
        if self.no_clip_search {
            scheme.weight_clip = spinquant::quant::Clip::Ratio(1.0);
        }
        scheme
    }

    /// Checks that nothing here contradicts the scheme that a written model has.
    pub fn check_written(&self, written: &Scheme, dir: &Path) -> Result<()> {
        let given = self.over(*written);
        if given == *written {
            return Ok(());
        }
        // The first that differs is the one to name.
        let fields = |s: &Scheme| {
            [
                ("--scheme", s.bits_name()),
                ("--symmetric-activations", s.symmetric_activations.to_string()),
                ("--asymmetric-weights", (!s.symmetric_weights).to_string()),
                ("--weight-group", s.weight_group.map_or("none".into(), |g| g.to_string())),
                ("--no-clip-search", (s.weight_clip == spinquant::quant::Clip::Ratio(1.0)).to_string()),
                ("--activation-clip", s.activation_clip.to_string()),
                ("--online", s.online.to_string()),
            ]
        };
        let differs = fields(written).into_iter().zip(fields(&given)).find(|(a, b)| a != b);
        differs.map_or(Ok(()), |((name, written), (_, given))| Err(contradicts(name, dir, &written, &given)))
    }

    /// The scheme for rotations: with the Hadamards that they were made for and the clip ratios that came with them, unless others were
    /// given.
    pub fn scheme_with(&self, rotations: Option<&RotationFile>, config: &LlamaConfig) -> Result<Scheme> {
        let scheme = self.scheme_online(rotations, config)?;
        Ok(Scheme { activation_clip: self.given_clip(rotations).unwrap_or_default(), ..scheme })
    }

    /// The scheme with the Hadamards that rotations were made for, unless others were given.
    pub fn scheme_online(&self, rotations: Option<&RotationFile>, config: &LlamaConfig) -> Result<Scheme> {
        let scheme = self.scheme();
        let made_for = rotations.map_or(Ok(None), |file| file.online(config.head_dim, config.intermediate_size))?;
        let Some((made_for, file)) = made_for.zip(rotations) else { return Ok(scheme) };
        let path = file.path().map_or_else(String::new, |path| path.display().to_string());
        let online = self.online.unwrap_or(made_for);
        if online != made_for {
            note(&format!("{path} was made for the online Hadamards {made_for}, and {online} run"));
        } else if self.online.is_none() && made_for != Online::BOTH {
            note(&format!("the online Hadamards are {made_for}, as {path} was made for"));
        }
        Ok(scheme.online(online))
    }

    /// The rotations of a file for a network of this scheme: with their clip constants, unless ratios were given or those are for
    /// other bits, and with the clip ratios of their weights, unless weights are not to be clipped.
    pub fn learned(&self, file: &RotationFile, scheme: &Scheme) -> Rotations {
        let mut rotations = file.rotations_for(scheme);
        if self.no_clip_search {
            rotations.weight_clips = None;
        }
        if self.activation_clip.is_some() { rotations.with_clips(ClipEnds::default()) } else { rotations }
    }

    /// The same for a network whose weights are quantised, before it is loaded.
    ///
    /// # Errors
    /// Names the file whose clip ratios of weights are for another grid.
    pub fn learned_for(&self, file: &RotationFile, scheme: &Scheme) -> Result<Rotations> {
        let rotations = self.learned(file, scheme);
        match (rotations.weight_clips_for(scheme), file.path()) {
            (Err(e), Some(path)) => Err(Error::format(path, e)),
            (Err(e), None) => Err(e),
            (Ok(_), _) => Ok(rotations),
        }
    }

    /// The clip ratios of the command line, or else those that came with the rotations for these bits.
    pub fn given_clip(&self, rotations: Option<&RotationFile>) -> Option<ClipRatios> {
        let scheme = self.scheme();
        self.activation_clip.or_else(|| {
            let file = rotations?;
            let path = file.path().map_or_else(String::new, |path| path.display().to_string());
            let Some(clips) = &file.clips else {
                if !file.rotations.clips.is_empty() {
                    note(&format!("{path} does not say for which bits its clip constants are: they are not used"));
                }
                return None;
            };
            let found = file.clips_for(&scheme);
            if found.is_none() {
                note(&format!("the clip ratios of {path} are for {}, not used for {scheme}", clips.bits));
            }
            found
        })
    }
}

/// A scheme with the bits of one that was given, and symmetric activations where that has them.
fn with_bits_of(given: &Scheme, scheme: Scheme) -> Scheme {
    let Scheme { weight_bits, activation_bits, key_bits, value_bits, symmetric_activations, .. } = *given;
    let symmetric_activations = symmetric_activations || scheme.symmetric_activations;
    let scheme = Scheme { weight_bits, activation_bits, key_bits, value_bits, symmetric_activations, ..scheme };
    let scheme = Scheme { activation_format: given.activation_format, weight_format: None, ..scheme };
    given.weight_format.map_or(scheme, |format| scheme.weights_in(format))
}
