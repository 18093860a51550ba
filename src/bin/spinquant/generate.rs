//! `spinquant generate`.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;
use spinquant::chat::{ChatTemplate, Message};
use spinquant::data::{Bos, Tokenizer, read_text};
use spinquant::generate::{Sampling, check_room, end_tokens, generate};
use spinquant::{Error, Result};

use crate::common::{Progress, at_least_one};
use crate::network::NetworkArgs;
use crate::{console, stop};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub network: NetworkArgs,
    /// Text to continue; with --chat, what the user says.
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_file", conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// The same from a file.
    #[arg(long, value_name = "FILE")]
    prompt_file: Option<PathBuf>,
    /// Put the prompt into the model's chat template, so that an instruction model answers it.
    #[arg(long)]
    chat: bool,
    /// What the system says in the chat template.
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Tokens to make at most.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    max_tokens: usize,
    /// Tokens of a calibration window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
    /// Divides the logits; 0 always takes the likeliest token.
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f64,
    /// Draw from so many of the likeliest tokens; 0: from all.
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Seed of the draws.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Go on behind a token that ends a text.
    #[arg(long)]
    ignore_end: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Tokens before a continuation that are decoded with it: some tokenizers write the first token of a text differently.
const BEFORE: usize = 16;

pub fn run(args: &Args) -> Result<()> {
    let sampling = Sampling { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p, seed: args.seed };
    sampling.check()?;
    let progress = Progress::new();
    let network = args.network.checked(args.seq_len, false)?;
    let dir = &args.network.model.model;
    let tokenizer = args.network.model.tokenizer()?;
    let prompt = prompt(args, &tokenizer)?;
    check_room(prompt.len(), args.max_tokens, network.config.max_position_embeddings)?;
    let ends = if args.ignore_end { vec![] } else { end_tokens(dir, &network.config)? };
    let merged = network.load(&progress)?;

    let _careful = stop::AfterStep::new();
    let before = &prompt[prompt.len().saturating_sub(BEFORE)..];
    let mut writer = Writer {
        tokenizer: &tokenizer,
        ids: before.to_vec(),
        shown: tokenizer.decode(before, false)?.len(),
        text: String::new(),
    };
    let mut tokens = vec![];
    let start = Instant::now();
    let made = generate(&merged, &prompt, args.max_tokens, &sampling, &ends, |token| {
        tokens.push(token);
        let piece = writer.next(token)?;
        if !args.json {
            console::piece(&piece);
        }
        Ok(stop::asked())
    });
    let seconds = start.elapsed().as_secs_f64();
    let rest = writer.rest()?;
    if args.json {
        let made = made?;
        out!(
            "{}",
            json!({
                "text": writer.text, "tokens": tokens, "prompt_tokens": prompt, "ended": made < args.max_tokens, "seconds": seconds,
            })
        );
        return Ok(());
    }
    out!("{rest}");
    let made = made?;
    say!("{} tokens behind {} in {seconds:.1} s ({:.1} tokens/s)", made, prompt.len(), made as f64 / seconds);
    say!("{}, {}", network.scheme, network.how());
    Ok(())
}

/// The tokens to continue.
fn prompt(args: &Args, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let text = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => text.clone(),
        (None, Some(file)) => read_text(file)?,
        (None, None) => return Err(Error::argument("--prompt", "expected a text, got none")),
    };
    if !args.chat {
        return tokenizer.encode_stream(&text, args.network.model.bos());
    }
    let template = ChatTemplate::from_dir(&args.network.model.model)?;
    let system = args.system.iter().map(|text| Message::new("system", text));
    let messages: Vec<Message> = system.chain([Message::new("user", text)]).collect();
    tokenizer.encode_stream(&template.render(&messages)?, Bos::None)
}

/// Makes text of tokens as they come.
struct Writer<'a> {
    tokenizer: &'a Tokenizer,
    /// The end of the prompt, and what followed.
    ids: Vec<u32>,
    /// Bytes of their text that were shown, or belong to the prompt.
    shown: usize,
    text: String,
}

impl Writer<'_> {
    /// What a token adds to the text; nothing while a character is not whole.
    fn next(&mut self, token: u32) -> Result<String> {
        self.ids.push(token);
        let text = self.tokenizer.decode(&self.ids, false)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) { Ok(String::new()) } else { Ok(self.show(&text)) }
    }

    /// What was held back.
    fn rest(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, false)?;
        Ok(self.show(&text))
    }

    fn show(&mut self, text: &str) -> String {
        let piece = text.get(self.shown..).unwrap_or_default().to_string();
        self.shown = self.shown.max(text.len());
        self.text += &piece;
        piece
    }
}
