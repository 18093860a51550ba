//! What learned rotations are compared with, on a GPU as on the CPU.

use spinquant::baselines::{QatOptions, adapted, generated_text, llm_qat, smooth_quant};
use spinquant::learn::LearnOptions;
use spinquant::llama::Llama;
use spinquant::optim::Schedule;
use spinquant::quant::Scheme;
use spinquant::{DType, Device, demo, objective};

use crate::common::need::gpu;

fn close(what: &str, (a, b): (f64, f64), by: f64) {
    assert!((a - b).abs() <= by * a.abs().max(0.05), "{what}: {a} on the CPU, {b} on the GPU");
}

fn both(device: &Device) -> [Llama; 2] {
    let model = demo::model().unwrap();
    [model.clone(), model.to_device(device).unwrap()]
}

#[test]
#[ignore = "needs a GPU"]
fn scales_in_closed_form_are_the_same() {
    let (device, text) = (gpu(), demo::windows(demo::CALIBRATION, 64).unwrap());
    let found = both(&device).map(|m| smooth_quant(&m, &Scheme::new(4, 8, 8), &text, &[0, 3], &mut ()).unwrap());
    for (a, b) in found[0].losses.iter().zip(&found[1].losses) {
        close(&format!("loss with exponent {}", a.0), (a.1, b.1), 2e-2);
    }
}

/// The first step's loss, and that the last one's network comes back to where it was scored.
#[test]
#[ignore = "needs a GPU"]
fn gains_and_weights_are_trained_the_same() {
    let (device, text) = (gpu(), demo::windows(demo::CALIBRATION, 64).unwrap());
    for name in ["cross-entropy", "kl-top-partial:50", "0.5*cross-entropy+0.5*kl"] {
        let objective = objective::by_name(name).unwrap();
        let options =
            LearnOptions { steps: 3, batch: 4, held_out: Some(4), scale_rate: 0.02, objective, ..LearnOptions::default() };
        let trained = both(&device).map(|m| adapted(&m, &text, &options, &mut ()).unwrap());
        close(name, (trained[0].losses.0, trained[1].losses.0), 1e-3);
        close(name, (trained[0].losses.1, trained[1].losses.1), 1e-2);
        assert_eq!(trained[1].network.embedding.device(), device);
    }
    let options = QatOptions { windows: 4, seq: 32, steps: 2, batch: 2, rate: 1e-4, schedule: Schedule::Cosine, seed: 1 };
    let full = both(&device).map(|m| m.merge(None, &Scheme::FULL_PRECISION).unwrap());
    let written = full.map(|n| generated_text(&n, 1, 4, 1, &mut ()).unwrap());
    assert_eq!(written[0].get(0), written[1].get(0), "the first tokens are the likeliest");
    let [on_host, on_device] = both(&device).map(|m| llm_qat(&m, &Scheme::new(4, 8, 8), &options, &mut ()).unwrap());
    // Drawn text may part after a rounding: the losses are of the same size.
    close("llm-qat", (on_host.losses.0, on_device.losses.0), 0.5);
    let weight = |t: &spinquant::baselines::Trained| t.network.blocks[0].weights.tensors().next().unwrap().clone();
    assert_eq!((weight(&on_device).device(), weight(&on_device).dtype()), (device, DType::F32));
}
