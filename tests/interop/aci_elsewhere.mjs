// Asks @phala/aci-verifier, by its published interface, about a report and receipts. Not a test: a program of its own.
//
// It is evaluated in the folder that holds node_modules/@phala/aci-verifier: a module looks for others from where it is.
//
//     cd FOLDER && node --input-type=module --eval "$(cat aci_elsewhere.mjs)" < question.json
//
// Standard input: {"report": object, "nonce": hex, "receipts": [{"receipt": object, "request": base64, "response":
// base64}]}. Standard output: {"report": bool, "receipts": [[signature and keyset, request, response], …]}; receipts are
// judged under an accepted report only.

import { readFileSync } from "node:fs";
import * as aci from "@phala/aci-verifier";

const question = JSON.parse(readFileSync(0, "utf8"));
const bound = await aci.verifyReportBinding(question.report, question.nonce);
const receipts = [];
for (const { receipt, request, response } of bound.ok ? question.receipts : []) {
  const said = await aci.verifyReceipt(receipt, bound.keyset, bound.workloadKeysetDigest);
  receipts.push([
    said.ok,
    await aci.checkRequestBodyHash(said.payload, Buffer.from(request, "base64")),
    await aci.checkResponseBodyHash(said.payload, Buffer.from(response, "base64")),
  ]);
}
console.log(JSON.stringify({ report: bound.ok, receipts }));
