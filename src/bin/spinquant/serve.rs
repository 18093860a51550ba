//! `spinquant serve`.

use std::time::Instant;

use spinquant::Result;
use spinquant::serve::{Server, Service};

use crate::common::Progress;
use crate::network::NetworkArgs;
use crate::stop;

/// Score prompts over HTTP, so that an evaluation harness can judge a quantised model.
///
/// POST /v1/completions takes OpenAI's requests with echo true and max_tokens 0 or 1, and returns the log-probability of every token of
/// the prompt and of the likeliest one in its place; GET /v1/models names the model; GET /tokenizer_info, POST /tokenize and
/// POST /detokenize are for harnesses without the tokenizer. Everything else is refused: this server is for scoring, it generates no text,
/// streams nothing and holds no chat. It asks nobody for a key, so it listens on this machine alone unless --host says otherwise.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub network: NetworkArgs,
    /// The port to listen on; 0: any free one.
    #[arg(long, value_name = "N", default_value_t = 8000)]
    port: u16,
    /// The address to listen on.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,
    /// Tokens of a calibration window.
    #[arg(long, default_value_t = 2048)]
    seq_len: usize,
}

pub fn run(args: &Args) -> Result<()> {
    let progress = Progress::new();
    let files = &args.network.model;
    let network = args.network.checked(args.seq_len, false)?;
    let config = &network.config;
    let tokenizer = match files.tokenizer() {
        Ok(tokenizer) => Some(tokenizer),
        Err(_) if files.is_synthetic() => None,
        Err(e) => return Err(e),
    };
    let service = Service {
        name: files.name(),
        tokenizer,
        bos: files.bos(),
        special_tokens: Service::special_tokens_of(&files.model),
        context: config.max_position_embeddings,
        vocabulary: config.vocab_size,
    };
    // Before the work begins: the port may be in use.
    let server = Server::bind(&args.host, args.port)?;
    let model = network.load(&progress)?;
    let address = server.address();
    if !address.ip().is_loopback() {
        say!("warning: {address} can be reached from other machines, and nobody is asked for a key");
    }
    // From here on a signal lets requests be answered first.
    let _careful = stop::AfterStep::new();
    out!("http://{address}");
    say!(
        "scoring with {}, {}, {}: POST http://{address}/v1/completions (Ctrl-C ends it)",
        service.name,
        network.scheme,
        network.how()
    );
    let start = Instant::now();
    let answered = server.run(&model, &service, &stop::flag(), &|line| say!("{line}"))?;
    say!("answered {answered} requests in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
