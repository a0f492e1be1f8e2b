// sandbox.bicep without a way in or out by the internet: jobs reach the stores through the
// workspace's managed network, people come through a network of their own. See README.md.
//
//   az deployment sub create --location westeurope --template-file private.bicep \
//     --parameters prefix=flchest silos='["hospital_a", "hospital_b"]' runner=OBJECT_ID
targetScope = 'subscription'

@minLength(3)
@maxLength(10)
param prefix string

@minLength(2)
param silos array

param runner string
param runnerType string = 'User'
param location string = deployment().location
param vmSize string = 'Standard_D4s_v5'

module federation 'sandbox.bicep' = {
  name: 'federation'
  params: {
    prefix: prefix
    silos: silos
    runner: runner
    runnerType: runnerType
    location: location
    vmSize: vmSize
    private: true
  }
}

resource group 'Microsoft.Resources/resourceGroups@2024-03-01' = {
  name: '${prefix}-runner'
  location: location
}

module network 'modules/network.bicep' = {
  name: 'network'
  scope: group
  params: {
    prefix: prefix
    location: location
    workspace: federation.outputs.workspaceId
    workspaceStore: federation.outputs.workspaceStore
    orchestratorStore: federation.outputs.orchestratorStore
    registry: federation.outputs.registryId
  }
}

@description('Put the machine that sends runs here, and reach it by Bastion or VPN.')
output machines string = network.outputs.machines
output silosYaml array = federation.outputs.silosYaml
output workspaceYaml string = federation.outputs.workspaceYaml
output storeNames array = federation.outputs.storeNames
output storeIds array = federation.outputs.storeIds
output registry string = federation.outputs.registry
